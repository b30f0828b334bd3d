"""Small models of several kinds of block, pre-trained on TinyStories by `mama pretrain`.

    python -m benchmarks.small_models --output runs/models [--kind gemma3 olmo2 ...]

Each is left in OUTPUT/KIND and made once; a killed run goes on. gemma3 and olmo2 have norms behind attention and MLP,
gpt_neox runs both side by side, mixtral routes tokens to experts. They stand beside the trained checkpoints of others
in benchmarks/oneshot.py, which names them by `--model`.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from transformers import CONFIG_MAPPING

from mama_trl.cli import main as mama

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
STEPS, BATCH, LENGTH = 1500, 8, 256
SHAPE = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {"tie_word_embeddings": True, "head_dim": 32, "sliding_window": 128,
                               "query_pre_attn_scalar": 32}),
    "gemma3_untied": ("gemma3_text", {"tie_word_embeddings": False, "head_dim": 32, "sliding_window": 128,
                                      "query_pre_attn_scalar": 32}),
    "olmo2": ("olmo2", {"tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", {"tie_word_embeddings": False, "rotary_pct": 0.25, "use_parallel_residual": True}),
    "mixtral": ("mixtral", {"tie_word_embeddings": True, "num_local_experts": 4, "num_experts_per_tok": 2,
                            "intermediate_size": 176}),
}


def make(kind: str, folder: Path, steps: int = STEPS) -> Path:
    """The folder of a pre-trained model of this kind; made, or finished, if it is not there."""
    done = folder / kind
    if (done / "model.safetensors").is_file():
        return done
    source = folder / ".configs" / kind
    source.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "models" / "stories260K" / name, source / name)
    model_type, changes = KINDS[kind]
    CONFIG_MAPPING[model_type](**{**SHAPE, **changes}).save_pretrained(source)
    code = mama([
        "pretrain", "--model_name_or_path", str(source), "--from_scratch", "true",
        "--dataset_name", str(DATA / "tinystories" / "train.jsonl"), "--output_dir", str(done),
        "--max_length", str(LENGTH), "--max_steps", str(steps), "--per_device_train_batch_size", str(BATCH),
        "--learning_rate", "3e-3", "--adam_beta2", "0.98", "--lr_scheduler_type", "cosine", "--warmup_steps", "100",
        "--save_steps", "500", "--save_total_limit", "2", "--logging_steps", "100", "--use_cpu", "true",
        "--report_to", "none", "--resume_from_checkpoint", "true", "--dtype", "float32",
    ])
    if code:
        raise SystemExit(code)
    for checkpoint in done.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return done


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", type=Path, required=True, metavar="DIR")
    options.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    args = options.parse_args()
    for kind in args.kind:
        print(json.dumps({"kind": kind, "folder": str(make(kind, args.output))}), flush=True)


if __name__ == "__main__":
    main()
