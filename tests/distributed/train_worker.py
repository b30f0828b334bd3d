"""Trains a tiny model on one engine and leaves what this rank ended with. Started by launch.py."""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

ENGINE = os.environ["MAMA_TEST_ENGINE"]
if ENGINE == "fsdp2":
    # accelerate ignores FSDP on a CPU: this makes it real.
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)

from mama_trl import MamaCallback, MamaConfig  # noqa: E402 (after the shim)
from mama_trl.engines import ranks  # noqa: E402 (after the shim)
from mama_trl.engines.detect import shards_of  # noqa: E402 (after the shim)
from mama_trl.indicators import trajectory  # noqa: E402 (after the shim)
from mama_trl.pruning.update import Update, update_masks  # noqa: E402 (after the shim)
from tests.conftest import tiny  # noqa: E402 (after the shim)

# Every way to choose masks, tried on the trained weights (0.8 sparse) one after the other, at 0.9.
WAYS = {
    "matrix": dict(indicators=["magnitude", "sensitivity=0.5"], redistribution="none", budget="uniform"),
    "budget": dict(indicators=["sensitivity"], redistribution="none", budget="sensitivity"),
    "curvature": dict(indicators=["curvature"], redistribution="none", budget="curvature"),
    "row": dict(indicators=["magnitude"], redistribution="none", scope="row"),
    "global": dict(indicators=["magnitude"], redistribution="none", scope="global"),
    "2:4": dict(indicators=["magnitude"], redistribution="none", pattern="2:4"),
    "bias": dict(indicators=["activation"], redistribution="bias"),
    "least_squares": dict(indicators=["activation"], redistribution="least_squares", budget="uniform"),
    "row, least_squares": dict(indicators=["activation"], scope="row", budget="uniform"),
    "mixed": dict(indicators=["activation", "sensitivity=0.5"], redistribution="none"),
}


class Mend(TrainerCallback):
    """Takes NaN out of the gradients when they have been recorded, so that the weights stay numbers: a run whose
    weights are none stops."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad = torch.nan_to_num(parameter.grad)


class Watch(TrainerCallback):
    """Counts violations after every step, writes down the first steps' statistics, can end one rank's process."""

    def __init__(self, mama, options):
        self.mama, self.options, self.violations, self.checked = mama, options, 0, 0
        self.statistics = {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step <= 2:
            self.statistics[state.global_step] = whole_statistics(self.mama)
        if self.mama.masks is not None:
            self.violations += self.mama.masks.verify()
            self.checked += 1
        if state.global_step == self.options.get("kill_at") and int(os.environ.get("RANK", 0)) == 1 % world():
            os._exit(9)


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def whole_statistics(mama) -> dict:
    found = {}
    for name, shard in mama.run.shards.items():
        whole = torch.zeros(shard.numel)
        whole[shard.start : shard.start + shard.length] = mama.trajectory.flat("sensitivity", name).float()
        found[name] = ranks.total(whole, shard.group)
    return found


def main(options: dict) -> None:
    folder, rank = Path(options["folder"]), int(os.environ.get("RANK", 0))
    trajectory.DTYPE = torch.float32
    rows = torch.randint(2, 384, (96, 24), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()}).with_format("torch")
    calibration = torch.randint(2, 384, (16, 24), generator=torch.Generator().manual_seed(1))
    config = dict(sparsity=0.8, mask_schedule="cubic", mask_start=3, mask_end=5, mask_interval=2, budget="uniform")
    mama = MamaCallback(
        MamaConfig(**{**config, **options.get("config", {})}),
        calibration=calibration if options.get("calibrate", True) else None,
    )
    watch = Watch(mama, options)
    bf16 = options.get("bf16", False)
    if bf16:
        import transformers.training_args

        transformers.training_args.is_torch_bf16_gpu_available = lambda *args: True
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=ENGINE in ("single", "ddp"), report_to=[], disable_tqdm=True, seed=0,
        ddp_backend="gloo" if world() > 1 else None, bf16=bf16 and ENGINE not in ("single", "ddp"),
        **{
            "max_steps": 6, "per_device_train_batch_size": 8 // world(), "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3, "max_grad_norm": 0.05, "save_strategy": "no", "logging_steps": 1,
            **options.get("args", {}),
        },
    )
    model = tiny(options.get("architecture", "llama"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in options.get("frozen", [])))
    mend = [Mend()] if (options.get("poison") or {}).get("kind") == "gradient" and ENGINE in ("ddp", "fsdp2") else []
    trainer = Trainer(model, args=args, train_dataset=data, callbacks=[mama, watch, *mend])
    if options.get("poison"):
        poison(trainer, mama, options["poison"])
    trainer.train(resume_from_checkpoint=options.get("resume"))
    parameter = next(iter(mama.run.shards.values())).parameter
    result = {
        "engine": mama.run.engine, "parameter": type(parameter).__name__, "world": world(), "rank": rank,
        "ds_id": hasattr(parameter, "ds_id"), "fragment": hasattr(parameter, "_hp_mapping"),
        "wrapped": type(trainer.model_wrapped).__name__, "digest": mama.masks and mama.masks.digest(),
        "sparsity": mama.sparsity, "violations": watch.violations, "checked": watch.checked,
        "skipped": int(mama.trajectory.skipped), "logs": trainer.state.log_history,
    }
    trainer.save_model(str(folder))
    torch.save(watch.statistics, folder / f"statistics{rank}.pt")
    torch.save({s.name: s.full() for s in every_shard(mama)}, folder / f"weights{rank}.pt")
    ranks.wait(ranks.everyone())
    if options.get("ways"):
        reference = Path(options.get("reference", folder))
        result["ways"] = {way: try_way(reference, trainer, mama, calibration, WAYS[way]) for way in options["ways"]}
    with open(folder / f"rank{rank}.json", "w") as file:
        json.dump(result, file)


def every_shard(mama) -> list:
    """Of all parameters, in the same order on every rank: the calibration reads embeddings and norms as well."""
    return shards_of(sorted(mama.run.model.named_parameters()))


def try_way(reference: Path, trainer, mama, calibration, way) -> dict:
    """One mask update on the weights and statistics that the reference run ended with, whoever it was."""
    weights_before = torch.load(reference / "weights0.pt")
    for shard in every_shard(mama):
        shard.write(weights_before[shard.name].to(shard.master.dtype))
    mama.trajectory.load(reference, resume=True)
    update = Update(
        mama.run.model, mama.run.targets, mama.run.shards, MamaConfig(sparsity=0.9, **way), mama.trajectory,
        trainer.optimizer, calibration[int(os.environ.get("RANK", 0)) :: world()],
    )
    with torch.no_grad():
        masks = update_masks(update, update.config.sparsity)
    flags = {name: masks.whole(name).int().flatten().tolist() for name in masks.names}
    weights = {name: shard.full().double().norm().item() for name, shard in mama.run.shards.items()}
    pruned = {shard.name: shard.full().float() for shard in every_shard(mama)}
    error = distance(weights_before, pruned, calibration)
    return {"kept": masks.kept, "violations": masks.verify(), "flags": flags, "weights": weights, "error": error}


@torch.no_grad()
def distance(dense: dict, pruned: dict, rows: torch.Tensor) -> float:
    """How far the pruned weights' outputs are from the dense ones', relative, from whole copies of both models."""
    found = []
    for values in (dense, pruned):
        model = tiny("llama").eval()
        model.load_state_dict(values, strict=False)
        found.append(model(rows).logits)
    return ((found[1] - found[0]).norm() / found[0].norm()).item()


def poison(trainer, mama, what: dict) -> None:
    """A NaN in this rank's own gradient at one step, or masks that one rank computes differently."""
    if int(os.environ.get("RANK", 0)) != what["rank"]:
        return
    if what["kind"] == "gradient":
        training_step = trainer.training_step
        layer = next(module for name, module in trainer.model.named_modules() if name.endswith("q_proj"))

        def spoil(module, args, output):
            output.register_hook(lambda gradient: gradient * float("nan"))

        def step(model, inputs, *args, **kwargs):
            handle = layer.register_forward_hook(spoil) if trainer.state.global_step == what["step"] else None
            try:
                return training_step(model, inputs, *args, **kwargs)
            finally:
                if handle is not None:
                    handle.remove()

        trainer.training_step = step
    else:
        import mama_trl.pruning.update as pruning

        select = pruning.select

        def other(update, *args):
            masks = select(update, *args)
            first = next(iter(masks.bits.values()))
            first.bitwise_not_()
            return masks

        pruning.select = other


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
