"""What MamaCallback costs a training run: step time and peak memory against the same run without it.

    python -m benchmarks.overhead --output overhead.json

A Llama of about 25 M parameters, 8 x 256 tokens per step, AdamW in fp32 (with a GPU: 1 B parameters in bf16). The
callback records sensitivity at every step and applies masks of 0.8 after every step; `torch.nn.utils.prune` applies
the same masks by its parametrization. Runs are interleaved in processes of their own; the time is the median over
all steps but the first two of each run, the memory the highest of a run with malloc's mmap threshold fixed, so that
freed tensors leave the process at once.
"""

import json
import statistics
import sys
import time

from benchmarks.common import child, parser, report

VARIANTS = ("plain", "mama", "torch prune")
SPARSITY = 0.8


def model_and_data(task: dict):
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8,
             "num_key_value_heads": 8, "vocab_size": 8192}
    if task["cuda"]:
        shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 18, "num_attention_heads": 16,
                 "num_key_value_heads": 16, "vocab_size": 32000}
    torch.manual_seed(task["seed"])
    model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=256, tie_word_embeddings=True))
    if task["cuda"]:
        model = model.to(torch.bfloat16)
    rows = torch.randint(shape["vocab_size"], (8 * task["steps"], 256))
    return model, Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()}).with_format("torch")


def measure(task: dict) -> dict:
    import resource

    import torch
    from torch.nn.utils import prune
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from mama_trl import MamaCallback, MamaConfig
    from mama_trl.model.targets import find_targets

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds = []

        def on_step_begin(self, *_, **__):
            self.began = self.now()

        def on_step_end(self, *_, **__):
            self.seconds.append(self.now() - self.began)

        @staticmethod
        def now() -> float:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter()

    model, data = model_and_data(task)
    parameters = model.num_parameters()
    clock, mama = Clock(), None
    callbacks = [clock]
    if task["variant"] == "mama":
        mama = MamaCallback(
            MamaConfig(
                sparsity=SPARSITY, mask_start=1, indicators=["magnitude"], redistribution="none", budget="uniform"
            )
        )
        callbacks = [mama, clock]  # the clock stops after our work of the step
    elif task["variant"] == "torch prune":
        for target in find_targets(model):
            prune.l1_unstructured(target.module, "weight", SPARSITY)
    args = TrainingArguments(
        output_dir=task["folder"], max_steps=task["steps"], per_device_train_batch_size=8, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_strategy="no", use_cpu=not task["cuda"], seed=task["seed"],
    )
    Trainer(model, args=args, train_dataset=data, callbacks=callbacks).train()
    if mama is not None:
        assert mama.sparsity > 0.79 and mama.masks.verify() == 0
        assert int(mama.trajectory.counts["sensitivity"]) == task["steps"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if task["cuda"]:
        peak = torch.cuda.max_memory_allocated()
    return {"seconds": clock.seconds[2:], "peak_bytes": peak, "parameters": parameters}


def main() -> None:
    import tempfile

    import torch

    args = parser(__doc__).parse_args()
    rounds, steps = (2, 6) if args.quick else (6, 8)
    seconds: dict[str, list] = {variant: [] for variant in VARIANTS}
    peaks, parameters = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        task = {"folder": folder, "seed": args.seed, "cuda": torch.cuda.is_available()}
        for number in range(rounds):
            # The order turns, so that no variant always follows the same other one.
            for variant in VARIANTS[number % 3 :] + VARIANTS[: number % 3]:
                one = child("benchmarks.overhead", {**task, "variant": variant, "steps": steps})
                seconds[variant] += one["seconds"]
        for variant in VARIANTS:
            one = child(
                "benchmarks.overhead", {**task, "variant": variant, "steps": 4},
                MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536", MALLOC_ARENA_MAX="1",
            )
            peaks[variant], parameters = one["peak_bytes"], one["parameters"]
    rows = []
    for variant in VARIANTS:
        step = statistics.median(seconds[variant])
        rows.append(
            {
                "run": variant, "step_seconds": step, "step_time_ratio": step / statistics.median(seconds["plain"]),
                "peak_MiB": peaks[variant] / 2**20,
                "extra_bytes_per_parameter": (peaks[variant] - peaks["plain"]) / parameters,
            }
        )
    summary = {
        "step_time_ratio": rows[1]["step_time_ratio"],
        "extra_bytes_per_parameter": rows[1]["extra_bytes_per_parameter"],
        "torch_prune_step_time_ratio": rows[2]["step_time_ratio"],
        "torch_prune_extra_bytes_per_parameter": rows[2]["extra_bytes_per_parameter"],
    }
    report(rows, summary, args, parameters=parameters, steps_timed={k: len(v) for k, v in seconds.items()})


if __name__ == "__main__":
    if "--child" in sys.argv:
        print(json.dumps(measure(json.loads(sys.argv[sys.argv.index("--child") + 1]))))
    else:
        main()
