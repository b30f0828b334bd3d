"""Sixty random ways to train, save, stop, go on and use things again; after each the files are counted.

The combinations are drawn with a seed. What is reported (the callback's number, the last one logged, the one in
`state.json`) must be what the saved weights hold, every masked connection must be zero in the file, and the run must
have come to what was asked for. The counting shares nothing with the package.
"""

import json
import random
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from mama_trl import (
    MamaCallback,
    MamaConfig,
    MamaDistillationConfig,
    MamaDistillationTrainer,
    MamaGRPOConfig,
    MamaGRPOTrainer,
    prune,
)
from mama_trl.demo import arithmetic
from tests.conftest import tiny
from tests.training import saved

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
COUNT, SEED, STEPS = 60, 11, 8
COMMON = dict(use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, gradient_checkpointing=False)
OWN = ("grpo", "distillation")  # trainers of ours, which bring their callback


@dataclass
class Case:
    """One combination: what is trained, how it is pruned, stopped, gone on with, and where it is saved."""

    number: int
    trainer: str
    start: str
    schedule: str
    sparsity: float
    packing: str
    accumulation: int
    resume: str
    reuse: str
    place: str
    dtype: str
    logging: int
    matrices: str

    def __str__(self):
        return "-".join(str(value) for name, value in asdict(self).items() if name != "number")


def drawn() -> list[Case]:
    draw, cases = random.Random(SEED), []
    while len(cases) < COUNT:
        trainer = draw.choice(["trainer", "sft", "dpo", "plain grpo", "grpo", "distillation"])
        start = draw.choice(["dense", "folder", "memory", "theirs"])
        schedules = ["oneshot", "cubic", "hold", "record"]
        schedule = draw.choice([kind for kind in schedules if kind != "hold" or start != "dense"])
        case = Case(
            number=len(cases), trainer=trainer, start=start, schedule=schedule,
            sparsity=draw.choice([0.6, 0.75, 0.9]),
            packing=draw.choice(["none", "wrapped"]) if trainer in ("sft", "distillation") else "none",
            accumulation=draw.choice([1, 2]),
            resume=draw.choice(["no", "no", "same", "other accumulation", "finished"]),
            reuse=draw.choice(["no", "no", "callback", "object"]),
            place=draw.choice(["output", "elsewhere", "model"]),
            dtype=draw.choice(["float32", "float32", "bfloat16"]),
            logging=draw.choice([1, 3]),
            matrices=random.Random(f"{SEED} {len(cases)}").choice(["all", "all", "attention"]),
        )
        if case.reuse == "callback" and trainer in OWN:
            continue
        cases.append(case)
    return cases


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class World:
    """Folders and data of one case."""

    def __init__(self, case: Case, folder: Path, tokenizer, rows):
        self.case, self.folder, self.tokenizer, self.rows = case, folder, tokenizer, rows
        self.dtype = getattr(torch, case.dtype)
        dense = tiny("llama").to(self.dtype)
        dense.save_pretrained(folder / "dense")
        tiny("llama", seed=3).to(self.dtype).save_pretrained(folder / "another")
        half = tiny("llama").to(self.dtype)
        prune(half, rows[:8], "magnitude", 0.5, progress=False).save(folder / "half")
        half.save_pretrained(folder / "half")
        theirs = tiny("llama").to(self.dtype)
        generator = torch.Generator().manual_seed(case.number)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if ".layers." in name and parameter.dim() == 2:
                    parameter[torch.rand(parameter.shape, generator=generator) < 0.5] = 0.0
        theirs.save_pretrained(folder / "theirs")

    def load(self, name):
        return LlamaForCausalLM.from_pretrained(self.folder / name, dtype=self.dtype)

    def model(self):
        """(model, share of zeros that it comes with and that are masked or to be held)."""
        start = self.case.start
        if start == "folder":
            return self.load("half"), 0.5
        if start == "theirs":
            return self.load("theirs"), 0.5 if self.case.schedule == "hold" else 0.0
        model = self.load("dense")
        if start == "memory":
            prune(model, self.rows[:8], "magnitude", 0.7, progress=False)
        return model, 0.7 if start == "memory" else 0.0

    def fields(self, schedule=None) -> dict:
        schedule = schedule or self.case.schedule
        chosen = {"exclude_modules": ["mlp"]} if self.case.matrices == "attention" else {}
        if schedule == "hold":
            return {"mask_schedule": "hold", **chosen}
        if schedule == "record":
            return {"sparsity": 0.0, "mask_schedule": "oneshot", **chosen}
        ramp = {"mask_end": 0.75, "mask_interval": 1} if schedule == "cubic" else {}
        calibrated = self.case.number % 3 == 0
        plain = {} if calibrated else {"indicators": ["magnitude"], "redistribution": "none"}
        fields = {"sparsity": self.case.sparsity, "mask_schedule": schedule, "mask_start": 0.25}
        return {**fields, **ramp, **plain, **chosen}

    def trainer(self, model, mama, output, accumulation, callbacks=(), schedule=None):
        """(trainer, callback): the batch of an optimizer step stays what it is, whatever the accumulation."""
        kind, case = self.case.trainer, self.case
        common = dict(
            COMMON, output_dir=str(output), per_device_train_batch_size=4, gradient_accumulation_steps=accumulation,
            num_train_epochs=1, save_strategy="steps", save_steps=2, learning_rate=1e-3, logging_steps=case.logging,
            save_total_limit=3, lr_scheduler_type="constant",
        )
        items = 4 * STEPS * case.accumulation
        texts = [f"{p}{a}\n" * 6 for p, a in arithmetic.sums(10, 40).train][:items]
        options = dict(processing_class=self.tokenizer, callbacks=list(callbacks))
        mama = mama or MamaCallback(MamaConfig(**self.fields(schedule)))
        if kind in ("trainer", "sft", "dpo", "plain grpo"):
            options["callbacks"].append(mama)
        packing = {"packing": case.packing != "none", "max_length": 32}
        if case.packing != "none":
            packing["packing_strategy"] = case.packing
            texts = texts * 2
        if kind == "trainer":
            data = Dataset.from_dict({"input_ids": self.rows.tolist()[:items], "labels": self.rows.tolist()[:items]})
            trainer = Trainer(
                model, args=TrainingArguments(**common), train_dataset=data.with_format("torch"), **options
            )
        elif kind == "sft":
            args = SFTConfig(**common, **packing)
            trainer = SFTTrainer(model, args=args, train_dataset=Dataset.from_dict({"text": texts}), **options)
        elif kind == "dpo":
            rows = [{"prompt": p, "chosen": a, "rejected": "0"} for p, a in arithmetic.sums(10, 40).train[:items]]
            trainer = DPOTrainer(model, args=DPOConfig(**common), train_dataset=Dataset.from_list(rows), **options)
        elif kind == "distillation":
            args = MamaDistillationConfig(**common, **packing, **self.fields(schedule))
            trainer = MamaDistillationTrainer(
                model, teacher_model=self.load("dense"), args=args, train_dataset=Dataset.from_dict({"text": texts}),
                **options,
            )
        else:
            prompts = Dataset.from_list([{"prompt": p, "answer": a} for p, a in arithmetic.sums(10, 40).train[:items]])
            shape = dict(num_generations=2, max_completion_length=4)
            if kind == "grpo":
                args = MamaGRPOConfig(**{**common, **shape, **self.fields(schedule)})
                trainer = MamaGRPOTrainer(model, [_lengths], args=args, train_dataset=prompts, **options)
            else:
                args = GRPOConfig(**common, **shape)
                trainer = GRPOTrainer(model, [_lengths], args=args, train_dataset=prompts, **options)
        return trainer, trainer.mama if kind in OWN else mama


def _lengths(completions, **kwargs):
    return [float(len(text) % 3) for text in completions]


def play(world: World):
    """(trainer, callback, folder that the model was saved in, sparsity that it should have at least)."""
    case, mama = world.case, None
    model, there = world.model()
    if case.reuse == "callback":
        first, mama = world.trainer(world.load("another"), None, world.folder / "first", 1)
        first.train()
    elif case.reuse == "object" and case.start != "theirs":
        first, _ = world.trainer(model, None, world.folder / "first", 1, schedule="oneshot")
        first.train()
        there = max(there, case.sparsity)
    output, accumulation = world.folder / "output", case.accumulation
    if case.resume in ("same", "other accumulation"):
        trainer, mama = world.trainer(model, mama, output, accumulation, [Stop(5)])
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        if case.resume == "other accumulation":
            accumulation = 3 - accumulation
        model = world.load("dense")
        trainer, mama = world.trainer(model, None if case.trainer in OWN else mama, output, accumulation)
        trainer.train(resume_from_checkpoint=True)
    else:
        trainer, mama = world.trainer(model, mama, output, accumulation)
        trainer.train()
        if case.resume == "finished":
            before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
            trainer, mama = world.trainer(world.load("dense"), None, output, accumulation)
            trainer.train(resume_from_checkpoint=True)
            changed = [n for n, value in trainer.model.state_dict().items() if not torch.equal(value, before[n])]
            assert not changed, f"a finished run was trained on: {len(changed)} tensors changed"
    place = output if case.place == "output" else world.folder / "place"
    trainer.model.save_pretrained(place) if case.place == "model" else trainer.save_model(str(place))
    target = case.sparsity if case.schedule in ("oneshot", "cubic") else 0.0
    return trainer, mama, place, max(target, there)


def masked_and_alive(folder) -> int:
    """Connections that `mama/masks.safetensors` prunes and the file's weights have; read by hand."""
    data = (Path(folder) / "mama" / "masks.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    weights, alive = saved.raw_tensors(folder), 0
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        packed = numpy.frombuffer(data[8 + size + begin : 8 + size + end], numpy.uint8)
        dtype, _, bits = weights[name]
        kept = numpy.unpackbits(packed, bitorder="little")[: bits.size].astype(bool)
        alive += int(((bits[~kept] & numpy.array(saved.SIGNS[dtype] - 1, bits.dtype)) != 0).sum())
    return alive


@pytest.mark.parametrize("case", drawn(), ids=str)
def test_what_is_reported_is_what_the_files_hold(case, tmp_path, tokenizer, rows):
    trainer, mama, place, least = play(World(case, tmp_path, tokenizer, rows))
    weights = {name for name in saved.raw_tensors(place) if name.endswith("_proj.weight")}
    attention = {name for name in weights if ".self_attn." in name}
    found = saved.sparsity(place, attention if case.matrices == "attention" else None)
    assert mama.sparsity == pytest.approx(found, abs=1e-6), "the callback says another number than the file"
    logged = [row["mama/sparsity"] for row in trainer.state.log_history if "mama/sparsity" in row]
    assert logged[-1] == pytest.approx(found, abs=1e-6), "the log says another number than the file"
    state = json.loads((tmp_path / "output" / "mama" / "state.json").read_text())
    assert state["sparsity"] == pytest.approx(found, abs=1e-6), "state.json says another number than the file"
    assert found >= least - 0.01, f"asked for {least}, and the file has {found}"
    there = {"folder": 0.5, "memory": 0.7}.get(case.start, 0.0)
    if case.matrices != "all":
        assert saved.sparsity(place, weights - attention) >= there - 0.01, "matrices left out have lost zeros"
    if least > 0:
        assert masked_and_alive(place) == 0
    assert saved.not_finite(place) == 0
    # The next stage holds what is there.
    if least > 0:
        model = LlamaForCausalLM.from_pretrained(place)
        args = TrainingArguments(**COMMON, output_dir=str(tmp_path / "next"), max_steps=2, save_strategy="no")
        data = Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()}).with_format("torch")
        after = Trainer(model, args=args, train_dataset=data,
                        callbacks=[MamaCallback(MamaConfig(mask_schedule="hold"))])
        after.train()
        after.save_model(str(tmp_path / "next"))
        assert saved.sparsity(tmp_path / "next") >= saved.sparsity(place) - 0.01, "the next stage lost zeros"
