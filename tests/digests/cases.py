"""`CASES`: name to a function without arguments that computes something and returns its tensors by name.

Cases come from plain lists of options; a name spells its options out. Each case makes everything it needs from fixed
seeds, so that it gives the same alone as among the others.
"""

import contextlib
import copy
import functools
import itertools
import tempfile
from functools import partial
from pathlib import Path
from typing import Callable, Iterator

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from . import adapter, models

CASES: dict[str, Callable[[], dict[str, Tensor]]] = {}
METHODS = ("magnitude", "wanda", "sparsegpt", "alps", "mama")
REDISTRIBUTIONS = ("none", "mean", "bias", "least_squares")
SCOPED = list(itertools.product(("row", "matrix"), REDISTRIBUTIONS))[:-1]  # the last ones are the defaults
RECORDED = ("sensitivity", "movement", "curvature", "reward")
NM = {"sparsity": 0.5, "pattern": "2:4"}
FEW = {"sparsity": 0.75, "pattern": "1:4"}


def case(kind: str, function: Callable[..., dict[str, Tensor]], *args, **options) -> None:
    """Adds a case named after its arguments."""
    name = " ".join([kind, *map(str, args), *_said(options)])
    assert name not in CASES, name
    CASES[name] = partial(function, *args, **options)


def _said(options: dict) -> list[str]:
    joined = {
        key: "+".join(_said(value) if isinstance(value, dict) else value) if isinstance(value, (dict, list)) else value
        for key, value in options.items()
    }
    return [f"{key}={value}" for key, value in joined.items()]


def after(model: nn.Module, masks=None) -> dict[str, Tensor]:
    """Masks, the weights they belong to, and all other parameters in one."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    kept = adapter.bits(masks) if masks is not None else {}
    found = {f"mask {name}": mask for name, mask in kept.items()}
    found |= {f"weight {name}": parameters[name] for name in kept}
    others = [value.flatten() for name, value in parameters.items() if name not in kept]
    return {**found, "other parameters": torch.cat(others)}


def state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"state {name}": tensor for name, tensor in tensors.items()}


def numbers(values: dict[str, float] | list[float]) -> dict[str, Tensor]:
    """The values as one tensor."""
    values = list(values.values()) if isinstance(values, dict) else values
    return {"values": torch.tensor(values, dtype=torch.float64)}


def listed(name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
    return {f"{name} {index}": tensor for index, tensor in enumerate(tensors)}


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


# ---------------------------------------------------------------------- without training


def oneshot(
    architecture: str, method: str, dtype: str = "float32", share: str = "", indicators: list[str] | None = None,
    **options,
) -> dict[str, Tensor]:
    """One model by `prune`.

    Args:
        indicators: those that a training run records get random scores.
        share: how an allocation is made and given: by `hand`, or by `gradients`.
    """
    model = models.model(architecture, dtype=getattr(torch, dtype))
    matrices = adapter.matrices(model)
    named = [indicator.partition("=")[0] for indicator in indicators or ()]
    options["criterion"] = indicators
    options["scores"] = {name: models.like(matrices, RECORDED.index(name)) for name in named if name in RECORDED}
    if share == "hand":
        options["allocation"] = {name: 0.3 + 0.3 * (index % 3) for index, name in enumerate(matrices)}
    if share == "gradients":
        options["allocation"] = adapter.sensitivity_allocation(model, models.rows(), options["sparsity"], 0.9)
    rows = None if method == "magnitude" else models.rows()
    return after(model, adapter.oneshot(model, rows, method, **options))


for method, options in itertools.product(METHODS, ({"sparsity": 0.6}, NM)):
    case("oneshot", oneshot, "llama", method, **options)
for scope, redistribution in SCOPED:
    case("oneshot", oneshot, "llama", "mama", sparsity=0.6, scope=scope, redistribution=redistribution)
for redistribution in ("none", "mean", "bias"):
    case("oneshot", oneshot, "llama", "mama", **NM, redistribution=redistribution)
for indicators, redistribution in itertools.product(
    (
        ["magnitude"], ["sensitivity"], ["activation", "magnitude=0.5"], ["activation", "sensitivity=0.5"],
        ["magnitude", "reward"], ["movement", "curvature=2", "activation"],
    ),
    ("least_squares", "none"),
):
    case("oneshot", oneshot, "llama", "mama", sparsity=0.6, indicators=indicators, redistribution=redistribution)
for options in (
    {"indicators": ["activation", "sensitivity"], "scope": "row"},
    {"indicators": ["activation", "sensitivity"], **NM},
    {"indicators": ["sensitivity"], "redistribution": "mean"},
    {"indicators": ["curvature", "magnitude"], "redistribution": "bias"},
    {"budget": "uniform"}, {"budget": "sensitivity", "blend": 1.0}, {"share": "hand"}, {"share": "gradients"},
    {"goals": False}, {"batch_size": 3}, {"dtype": "bfloat16"}, FEW,
):
    case("oneshot", oneshot, "llama", "mama", **{"sparsity": 0.6, **options})
for sparsity in (0.0, 0.9, 0.97):
    case("oneshot", oneshot, "llama", "mama", sparsity=sparsity)
for method in ("magnitude", "wanda", "sparsegpt", "alps"):
    case("oneshot", oneshot, "llama", method, sparsity=0.6, share="hand")
case("oneshot", oneshot, "llama", "wanda", sparsity=0.6, budget="sensitivity")
case("oneshot", oneshot, "llama", "sparsegpt", sparsity=0.6, dtype="bfloat16")
for architecture in sorted(set(models.CHANGES) - {"llama"}):
    for method in METHODS if architecture in ("gpt2", "gemma2", "mixtral") else ("sparsegpt", "mama"):
        case("oneshot", oneshot, architecture, method, sparsity=0.6)
for architecture, options in itertools.product(
    ("gpt2", "mixtral", "gpt_oss"), (NM, {"scope": "row"}, {"indicators": ["activation", "reward"]})
):
    case("oneshot", oneshot, architecture, "mama", **{"sparsity": 0.6, **options})


def gradients(architecture: str) -> dict[str, Tensor]:
    return adapter.calibration_gradients(models.model(architecture), models.rows())


def allocation(architecture: str, sparsity: float, blend: float) -> dict[str, Tensor]:
    return numbers(adapter.sensitivity_allocation(models.model(architecture), models.rows(), sparsity, blend))


def inputs(architecture: str) -> dict[str, Tensor]:
    return adapter.grams(models.model(architecture), models.rows())


def goals(architecture: str) -> dict[str, Tensor]:
    return adapter.goals(models.model(architecture), models.rows())


for architecture in ("gpt2", "mixtral"):
    case("gradients", gradients, architecture)
    case("allocation", allocation, architecture, sparsity=0.7, blend=0.6)
    case("grams", inputs, architecture)
    case("goals", goals, architecture)


def resumed_oneshot(architecture: str, **options) -> dict[str, Tensor]:
    """Killed after the first block and called again."""
    with folder() as path:
        return after(*adapter.resumed_oneshot(partial(models.model, architecture), models.rows(), path, **options))


for architecture, method in (("llama", "mama"), ("gpt2", "mama"), ("mixtral", "sparsegpt"), ("gpt_neox", "wanda")):
    case("resumed oneshot", resumed_oneshot, architecture, method=method, sparsity=0.6)


def structures(architecture: str, structure: str, sparsity: float, **options) -> dict[str, Tensor]:
    """The smaller model's tensors."""
    model = models.model(architecture)
    return state(adapter.structures(model, models.rows(), structure, sparsity=sparsity, **options).state_dict())


for architecture, structure in (
    ("llama", "neurons"), ("llama", "heads"), ("qwen3", "heads"), ("gpt2", "neurons"), ("gpt_neox", "neurons"),
    ("gemma2", "neurons"), ("mixtral", "neurons"), ("gpt_oss", "neurons"), ("phi3", "neurons"), ("phi3", "heads"),
):
    case("structures", structures, architecture, structure, 0.5)
for structure, (method, redistribution) in itertools.product(
    ("neurons", "heads"), (("wanda", "least_squares"), ("magnitude", "none"), ("random", "none"), ("mama", "none"))
):
    case("structures", structures, "llama", structure, 0.5, method=method, redistribution=redistribution)


# ---------------------------------------------------------------------- while training

QUIET = {
    "use_cpu": True, "report_to": [], "disable_tqdm": True, "seed": 0, "per_device_train_batch_size": 4,
    "logging_strategy": "no", "save_strategy": "no", "learning_rate": 1e-2,
}
TRL = {**QUIET, "bf16": False, "gradient_checkpointing": False}
SKIP = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}


class KillAfter(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def data(count: int = 40) -> Dataset:
    rows = models.rows(count).tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch")


def run(model: nn.Module, path: Path, options: dict, arguments: dict | None = None, calibration=None, kill: int = 0):
    """Trains by a plain Trainer with the callback; (trainer, callback).

    Args:
        options: of the callback's configuration.
        kill: step at which the run is stopped from outside and called again with another model, which resumes.
    """
    args = {**QUIET, "output_dir": str(path), "max_steps": 6, **(arguments or {})}

    def attempt(model: nn.Module, *more: TrainerCallback, resume: bool = False):
        callback = adapter.callback(calibration, **options)
        trainer = Trainer(model, TrainingArguments(**args), train_dataset=data(), callbacks=[callback, *more])
        trainer.train(resume_from_checkpoint=resume)
        return trainer, callback

    if not kill:
        return attempt(model)
    try:
        attempt(model, KillAfter(kill))
    except KeyboardInterrupt:
        return attempt(models.model(seed=9), resume=True)
    raise AssertionError("the run was not killed")


def trained(trainer, callback, watched: bool = False) -> dict[str, Tensor]:
    found = after(trainer.model, adapter.masks_of(callback))
    return {**found, **adapter.statistics_of(callback)} if watched else found


def train(
    architecture: str, dtype: str = "float32", arguments: dict | None = None, kill: int = 0, own_rows: bool = False,
    watched: bool = False, **options,
) -> dict[str, Tensor]:
    """A short run of the plain Trainer; `options` as in `run`.

    Args:
        own_rows: whether calibration tokens are given, instead of those of the training batches.
        watched: whether the statistics are looked at too.
    """
    with folder() as path:
        model, calibration = models.model(architecture, dtype=getattr(torch, dtype)), models.rows(8, seed=5)
        trainer, callback = run(model, path, options, arguments, calibration if own_rows else None, kill)
        return trained(trainer, callback, watched)


CUBIC = {"mask_schedule": "cubic", "mask_start": 2, "mask_end": 5, "mask_interval": 2}
START = {"sparsity": 0.6, "mask_start": 3}
SELECTED = {**START, "redistribution": "none"}
ALL = ["sensitivity", "movement", "reward"]
SAVING = {"save_strategy": "steps", "save_steps": 2}
for architecture in sorted(models.CHANGES):
    case("train", train, architecture, **START)
for architecture in ("llama", "gpt2", "mixtral"):
    case("train", train, architecture, sparsity=0.8, **CUBIC)
for scope, redistribution in SCOPED:
    case("train", train, "llama", **START, redistribution=redistribution, scope=scope)
for indicators, redistribution in itertools.product(
    (
        ["magnitude"], ["sensitivity"], ["movement"], ["curvature"], ["activation", "sensitivity=0.5"],
        ["magnitude", "sensitivity"], ["curvature", "movement=0.5"],
    ),
    ("none", "least_squares"),
):
    options = {"indicators": indicators, "redistribution": redistribution, "statistics": ALL}
    case("train", train, "llama", **START, **options)
for architecture, options in itertools.product(
    ("llama", "gpt2"),
    (
        {"scope": "row"}, {"scope": "global", "budget": "uniform"}, NM,
        {"budget": "curvature", "budget_blend": 1.0},
    ),
):
    case("train", train, architecture, **{**SELECTED, "indicators": ["magnitude", "sensitivity"], **options})
for options in (
    NM, {**FEW, "redistribution": "mean"}, {"budget": "uniform"},
    {"budget": "sensitivity", "budget_blend": 1.0}, {"budget": "curvature"}, {"own_rows": True},
    {"calibration_tokens": 96}, {"target_modules": [r"mlp\."], "exclude_modules": ["down_proj"]},
    {"dtype": "bfloat16"}, {"indicators": ["curvature"], "budget": "uniform", "arguments": {"optim": "sgd"}},
    {"arguments": {"optim": "adafactor"}}, {"arguments": {"gradient_accumulation_steps": 2}},
    {"arguments": {"weight_decay": 0.1, "max_grad_norm": 0.01}},
):
    case("train", train, "llama", **{**START, **options})
case("train", train, "qwen3", **START, target_modules=["down_proj", "lm_head"])
case("train", train, "llama", sparsity=0.0, statistics=ALL, watched=True)
case("train", train, "gpt2", sparsity=0.0, statistics=ALL, watched=True)
case("train", train, "gpt2", **START, statistics=ALL, watched=True)
case("train", train, "gpt2", dtype="bfloat16", sparsity=0.0, statistics=ALL, watched=True)
for options in ({"mask_start": 2}, {"mask_start": 5}, CUBIC):  # resumed from step 2, with a mask and before it
    case("train", train, "llama", sparsity=0.8, **options, arguments=SAVING, kill=4, watched=True)


def next_stage(**options) -> dict[str, Tensor]:
    """A run from the model that another one left, with masks and statistics beside it."""
    with folder() as path:
        trainer, _ = run(models.model(), path / "first", START)
        trainer.save_model(str(path / "first"))
        model = type(trainer.model).from_pretrained(path / "first")
        return trained(*run(model, path / "second", options), watched=True)


for options in (
    {"sparsity": 0.6, "mask_schedule": "hold"}, {"sparsity": 0.8, **CUBIC}, {**START, "inherit_masks": False},
    {"sparsity": 0.0},
):
    case("next stage", next_stage, **options)


def sft(architecture: str, **options) -> dict[str, Tensor]:
    """The callback in a plain SFTTrainer, on text."""
    texts = [f"{number}+{number * 7 % 13}={number + number * 7 % 13}\n" for number in range(32)]
    with folder() as path:
        callback = adapter.callback(**options)
        trainer = SFTTrainer(
            models.model(architecture), args=SFTConfig(**TRL, output_dir=str(path), max_steps=5, max_length=16),
            train_dataset=Dataset.from_dict({"text": texts}), processing_class=models.tokenizer(),
            callbacks=[callback],
        )
        trainer.train()
        return trained(trainer, callback)


for architecture in ("llama", "gpt2"):
    case("sft", sft, architecture, **START)
case("sft", sft, "qwen3", sparsity=0.8, **CUBIC)


def lengths(completions, **_) -> list[float]:
    return [float(len(text) % 3) for text in completions]


def grpo(architecture: str, own_rows: bool = False, **options) -> dict[str, Tensor]:
    """Three steps of GRPO."""
    prompts = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(6) for b in range(4)])
    with folder() as path:
        arguments = {
            **TRL, "output_dir": str(path), "max_steps": 3, "per_device_train_batch_size": 8, "num_generations": 4,
            "max_completion_length": 6, "learning_rate": 1e-3, "sparsity": 0.8, "mask_start": 2, **options,
        }
        trainer = adapter.grpo(
            models.model(architecture), [lengths], arguments, models.rows(8) if own_rows else None,
            train_dataset=prompts, processing_class=models.tokenizer(),
        )
        trainer.train()
        return trained(trainer, adapter.callback_of(trainer), watched=True)


for architecture, options in (
    ("llama", {}), ("gpt2", {}), ("qwen3", {"own_rows": True}), ("llama", {"indicators": ["reward"]}),
    ("llama", {"indicators": ["reward"], "redistribution": "none"}), ("gpt2", NM),
    ("llama", {"indicators": ["activation", "reward=0.5"], "budget": "uniform"}),
    ("llama", {"mask_schedule": "cubic", "mask_start": 1, "mask_end": 3, "mask_interval": 1}),
):
    case("grpo", grpo, architecture, **options)


def distillation(architecture: str, own_rows: bool = False, **options) -> dict[str, Tensor]:
    """Three steps from a dense teacher to a student with masks beside it."""
    teacher = models.model(architecture)
    student = copy.deepcopy(teacher)
    with folder() as path:
        adapter.oneshot(student, None, "magnitude", sparsity=0.5).save(path / "student")
        student.save_pretrained(path / "student")
        student = AutoModelForCausalLM.from_pretrained(path / "student")
        trainer = adapter.distillation(
            student, teacher, {**TRL, **SKIP, "output_dir": str(path / "out"), "max_steps": 3, **options},
            models.rows(8) if own_rows else None, train_dataset=data(), processing_class=models.tokenizer(),
        )
        trainer.train()
        return trained(trainer, adapter.callback_of(trainer), watched=True)


for architecture, options in (
    ("llama", {}), ("gpt2", {}), ("qwen3", {"temperature": 2.0, "cross_entropy_weight": 0.5}),
    ("llama", {"sparsity": 0.8, "mask_schedule": "oneshot", "mask_start": 2, "own_rows": True}),
):
    case("distillation", distillation, architecture, **options)


# ---------------------------------------------------------------------- files


def saved_masks() -> dict[str, Tensor]:
    """Masks written and read again, without and with a model."""
    with folder() as path:
        model = models.model("gpt2")
        adapter.oneshot(model, None, "magnitude", sparsity=0.6).save(path)
        alone = adapter.bits(adapter.saved_masks(path))
        alone = {f"read alone {name}": mask for name, mask in alone.items()}
        return {**alone, **after(model, adapter.saved_masks(path, model))}


def packed(architecture: str, pattern: str, dtype: str) -> dict[str, Tensor]:
    """The state that a packed file gives back."""
    with folder() as path:
        model = models.model(architecture, dtype=getattr(torch, dtype))
        masks = adapter.oneshot(model, None, "magnitude", sparsity=0.5, pattern=pattern)
        size = adapter.save_packed(model, masks, path / "packed.safetensors")
        found = adapter.load_packed(path / "packed.safetensors")
        assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
        return {**state(found), **numbers([size])}


case("saved masks", saved_masks)
for arguments in (("llama", "2:4", "float32"), ("gpt2", "unstructured", "bfloat16"), ("mixtral", "2:4", "float32")):
    case("packed", packed, *arguments)


@functools.cache
def left(architecture: str) -> tuple[tempfile.TemporaryDirectory, Path]:
    """A checkpoint of a run that pruned nothing, with a tokenizer and a text; the folder lives as long as the first."""
    held = tempfile.TemporaryDirectory()
    path = Path(held.name)
    run(models.model(architecture), path, {"sparsity": 0.0, "statistics": ALL}, {**SAVING, "weight_decay": 0.1})
    models.tokenizer().save_pretrained(path / "checkpoint-6")
    sums = (f"{a} plus {b} makes {a + b}." for a in range(12) for b in range(12))
    (path / "text.txt").write_text("\n\n".join(sums))
    return held, path / "checkpoint-6"


def left_scores(architecture: str) -> dict[str, Tensor]:
    """Indicators that a run left, and the sparsity of each matrix that each of them asks for."""
    _, checkpoint = left(architecture)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    scores = adapter.left_by_training(checkpoint, model)
    found = {f"{score} {name}": value for score, values in scores.items() for name, value in values.items()}
    for score in scores:
        shares = adapter.allocation_of(model, scores[score], 0.7, 0.6)
        found[f"allocation by {score}"] = numbers(shares)["values"]
    return found


def command(architecture: str, *options: str) -> dict[str, Tensor]:
    """What `mama prune` makes of that checkpoint."""
    _, checkpoint = left(architecture)
    with folder() as path:
        text = str(checkpoint.parent / "text.txt")
        argv = ["prune", str(checkpoint), "--output", str(path / "out"), "--calibration", text, "--sparsity", "0.6",
                "--calibration_tokens", "1024", "--sequence_length", "32", *options]
        assert adapter.main(argv) == 0
        model = AutoModelForCausalLM.from_pretrained(path / "out")
        return after(model, adapter.saved_masks(path / "out"))


for architecture in ("llama", "gpt2"):
    case("left scores", left_scores, architecture)
for options in (
    "", "--method wanda", "--method sparsegpt --pattern 2:4 --sparsity 0.5 --seed 1",
    "--method alps --budget sensitivity", "--scope row", "--redistribution bias", "--indicators curvature",
    "--indicators movement magnitude=0.5", "--indicators sensitivity activation --redistribution none",
    "--budget curvature", "--budget reward",
    "--pattern neurons", "--pattern heads --method wanda",
):
    case("command", command, "llama", *options.split())
for options in ("", "--indicators reward sensitivity", "--budget curvature --scope row"):
    case("command", command, "gpt2", *options.split())


# ---------------------------------------------------------------------- pure functions of tensors


def solve(
    method: str, sparsity: float, pattern: str = "unstructured", importance: bool = False, cross: bool = False,
    inputs: int = 32, **options,
) -> dict[str, Tensor]:
    """One matrix by one method's own function."""
    weight, samples = models.matrix(inputs=inputs)
    if importance:
        options["importance"] = models.like({"": weight}, 0)[""] + 0.1
    if cross:
        options["cross"] = weight @ samples.T @ (samples + 0.1 * samples.roll(1, 1))
    return dict(zip(("weight", "mask"), adapter.solve(method, weight, samples, sparsity, pattern, **options)))


for method, (sparsity, pattern) in itertools.product(
    METHODS, ((0.5, "unstructured"), (0.9, "unstructured"), (0.5, "2:4"))
):
    case("solve", solve, method, sparsity, pattern)
for options in (
    {"by_row": True}, {"importance": True}, {"cross": True},
    {"pattern": "2:4", "importance": True, "cross": True},
):
    case("solve", solve, "mama", 0.7, **options)
case("solve", solve, "alps", 0.01)  # its first penalty is too stiff
case("solve", solve, "sparsegpt", 0.6, inputs=300)  # several of its blocks of columns


def redistributed() -> dict[str, Tensor]:
    weight, samples = models.matrix()
    return adapter.redistributed(weight, samples, models.like({"": weight}, 0)[""] > 0.05)


def solved_structures(size: int) -> dict[str, Tensor]:
    return adapter.solved_structures(*models.matrix(), size=size, keep=16 // size)


case("redistributed", redistributed)
for size in (1, 4):
    case("solved structures", solved_structures, size=size)


def scores(kind: str, sizes: tuple[int, ...]) -> list[Tensor]:
    """Random numbers: `normal`, `positive`, `rounded` (many ties), or `half` (bf16)."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(size, generator=generator) for size in sizes]
    change = {"normal": Tensor.float, "positive": Tensor.abs, "rounded": partial(Tensor.round, decimals=1),
              "half": Tensor.bfloat16}
    return [change[kind](part) for part in parts]


def largest(kind: str, size: str, share: float) -> dict[str, Tensor]:
    """The largest of several parts, with a few scores or so many that a sample brackets the threshold first."""
    sizes = {"few": (30_000, 0, 17, 45_001), "many": (1_500_000, 0, 17, 900_001)}[size]
    return listed("mask", adapter.keep_largest(scores(kind, sizes), round(share * sum(sizes))))


def in_matrix(**options) -> dict[str, Tensor]:
    """One mask (out, in), and those of the same scores stored (in, out)."""
    found = {"mask": adapter.keep_in_matrix(scores("rounded", (64 * 48,))[0].view(64, 48), **options)}
    stored = scores("rounded", (48 * 64,))[0].view(48, 64)
    if options.get("by_row"):
        found["stored mask"] = adapter.keep_in_stored(stored, "row", 20)
    if "pattern" in options:
        found["stored mask"] = adapter.keep_in_stored(stored, "n:m", *map(int, options["pattern"].split(":")))
    return found


def everywhere(kind: str, sparsity: float, floor: float) -> dict[str, Tensor]:
    """One threshold over matrices of unlike scale and size, and the sparsities that such a contest gives."""
    parts = [part.abs().float() * (index + 1) ** 2 for index, part in enumerate(scores(kind, (400, 3000, 1200, 64)))]
    shares = {f"allocation {blend}": torch.tensor(adapter.allocate(parts, sparsity, blend), dtype=torch.float64)
              for blend in (0.3, 1.0)}
    means = numbers([adapter.order_free_mean(part) for part in parts])
    return {**listed("mask", adapter.keep_everywhere(parts, sparsity, floor)), **shares, **means}


for kind, size in itertools.product(("normal", "positive", "rounded", "half"), ("few", "many")):
    case("largest", largest, kind, size, 0.3)
case("largest", largest, "positive", "many", 0.9)
for options in ({}, {"by_row": True}, {"pattern": "2:4"}, {"pattern": "1:8"}):
    case("in matrix", in_matrix, sparsity=0.6, **options)
for arguments in (("positive", 0.8, 0.25), ("positive", 0.5, 0.9), ("rounded", 0.6, 0.0), ("normal", 0.0, 0.25)):
    case("everywhere", everywhere, *arguments)


def formulas() -> dict[str, Tensor]:
    """Indicators and how they are combined."""
    weight, samples = models.matrix()
    found = adapter.formulas(weight, weight.roll(1), weight.roll(2).square(), samples.norm(dim=0), weight[:, 0])
    for weights in ({"magnitude": 1.0}, {"activation": 1.0, "sensitivity": 0.5}, {"movement": 2.0, "curvature": 1.0}):
        found[f"combined {weights}"] = adapter.combine(found, weights)
    return found


def trajectory(dtype: str) -> dict[str, Tensor]:
    """Statistics of random gradients, one of which holds a NaN and one nothing but zeros."""
    model = models.model("gpt2", dtype=getattr(torch, dtype))
    shapes = {name: value for name, value in model.named_parameters()}
    steps = [models.like(shapes, seed) for seed in range(70)]  # longer than the mean's window
    steps = [{name: value - 0.2 for name, value in step.items()} for step in steps]
    for values in steps[3].values():
        values[..., 0] = float("nan")
    steps[5] = {name: torch.zeros_like(value) for name, value in steps[5].items()}
    return adapter.trajectory(model, steps, ALL)


def schedules() -> dict[str, Tensor]:
    """Sparsity along runs of three lengths."""
    plans = itertools.product(("oneshot", "cubic", "hold"), ((0.1, 0.5, 10), (3, 40, 4), (0.3, 50, 7)), (8, 100))
    return {f"{kind} {plan} {steps}": adapter.schedule(kind, 0.8, *plan, steps) for kind, plan, steps in plans}


case("formulas", formulas)
for dtype in ("float32", "float16"):
    case("trajectory", trajectory, dtype)
case("schedules", schedules)
