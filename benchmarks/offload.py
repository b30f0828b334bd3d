"""Memory of `mama prune` by depth: all weights in memory, and one block at a time (`--offload disk`).

    python -m benchmarks.offload --output offload.json [--model DIR]      # DIR as well, such as runs/smollm2

Random Llamas of SmolLM2-135M's widths (hidden 576, MLP 1536, vocabulary 4096, bf16) with 6, 30 and 60 blocks are pruned
by MAMA to 0.7 on 8 x 128 random tokens, each in a process of its own. `above_start` is the peak of that process's
resident memory above what it had once everything was imported; `seconds` are the clock's. The summary says how much the
peak grows from 6 to 60 blocks, per billion parameters.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.common import parser, report

DEPTHS = (6, 30, 60)
CHILD = """
import json, sys, time
from pathlib import Path
import torch
from mama_trl import prune
from mama_trl.evaluation.loading import load_model
from mama_trl.evaluation.placing import file_size, placing_of
from mama_trl.model.targets import find_targets
from mama_trl.pruning.placement import LocalPlacement
import transformers.models.llama.modeling_llama, torch._dynamo, accelerate.hooks
from benchmarks.common import highest, resident
folder, offload, output, vocabulary = sys.argv[1:5]
rows = torch.randint(2, int(vocabulary), (8, 128), generator=torch.Generator().manual_seed(0))
torch.randn(256, 256) @ torch.randn(256, 256)
start, begun = resident(), time.perf_counter()
placing = placing_of(folder, "auto", rows.numel(), "cpu", offload)
place = Path(output) / "blocks" if offload == "disk" else None
model = load_model(folder, device="cpu", device_map=placing.device_map, offload_folder=place)
targets = find_targets(model)
masks = prune(model, rows, sparsity=0.7, placement=LocalPlacement(targets, place), progress=False)
model.save_pretrained(output, **({"max_shard_size": file_size(model)} if offload == "disk" else {}))
peak = highest()
print(json.dumps({
    "parameters": sum(p.numel() for p in model.parameters()), "expected": placing.held, "above_start": peak - start,
    "seconds": time.perf_counter() - begun, "sparsity": masks.sparsity(), "digest": masks.digest(),
}))
"""


def random_model(folder: Path, depth: int) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=4096, hidden_size=576, intermediate_size=1536, num_hidden_layers=depth, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, dtype=torch.bfloat16,
    )).to(torch.bfloat16).save_pretrained(folder / str(depth))
    return folder / str(depth)


def measured(model: Path, offload: str, folder: Path) -> dict:
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    own = [sys.executable, "-c", CHILD, str(model), offload, str(folder / "pruned"), str(vocabulary)]
    done = subprocess.run(own, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", type=Path, metavar="DIR", help="one more model")
    args = options.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        models = {str(depth): random_model(folder, depth) for depth in (DEPTHS[:2] if args.quick else DEPTHS)}
        if args.model:
            models[args.model.name] = args.model
        for name, model in models.items():
            for offload in ("none", "disk"):
                rows.append({"model": name, "offload": offload, **measured(model, offload, folder)})
                print({key: value for key, value in rows[-1].items() if key != "digest"}, flush=True)
            assert rows[-1]["digest"] == rows[-2]["digest"], "the masks differ"
    summary = {}
    for offload in ("none", "disk"):
        own = [row for row in rows if row["offload"] == offload and row["model"].isdigit()]
        grown = own[-1]["above_start"] - own[0]["above_start"]
        more = own[-1]["parameters"] - own[0]["parameters"]
        summary[f"growth_bytes_per_parameter_{offload}"] = grown / more
        summary[f"peak_gb_{offload}_deepest"] = own[-1]["above_start"] / 1e9
    report([{key: value for key, value in row.items() if key != "digest"} for row in rows], summary, args)


if __name__ == "__main__":
    main()
