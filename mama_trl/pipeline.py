"""`mama run`: text and task, pre-training, SFT, GRPO with pruning, distillation, baselines, report.

Every stage leaves a folder and, last of all, `stage.json` in it: a killed run goes on after the last stage that
finished. All stages share one seed, one tokenizer, one evaluation and one set of calibration tokens.
"""

import json
import os
import platform
import shutil
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Callable, Optional

import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar
from trl import SFTConfig, SFTTrainer

from .callback import MamaCallback
from .config import MamaConfig, check_sparsity
from .demo import arithmetic, corpus
from .demo.tokenizer import train_tokenizer
from .distillation import MamaDistillationConfig, MamaDistillationTrainer
from .errors import MamaError
from .evaluation import blocks, model_bytes, perplexity, sparsity_by_matrix, task_accuracy
from .evaluation.tasks import generate
from .grpo import MamaGRPOConfig, MamaGRPOTrainer
from .masks import MaskSet
from .oneshot import prune
from .packing import save_packed
from .progress import StageBar
from .report import write_report
from .report.facts import attribution_histogram, trajectory_curves
from .storage import write_atomically

BASELINES = ("magnitude", "wanda", "sparsegpt")
STAGES = ("data", "pretrain", "sft", "grpo", "distill", "baselines", "report")


@dataclass
class DataConfig:
    """Text, tokenizer and task."""

    sequence_length: int = 256
    vocab_size: int = 1024
    characters: int = 6_000_000
    operands_from: int = 10
    operands_below: int = 50
    task_share: float = 0.5  # of the sequences in SFT and distillation
    calibration_blocks: int = 64  # half text, half task
    evaluation_blocks: int = 128


@dataclass
class RunConfig:
    """A recipe for `mama run`. `pretrain`, `sft`, `grpo` and `distill` hold the trainers' own arguments."""

    output_dir: str
    seed: int = 0
    sparsity: float = 0.8
    title: str = "MAMA demo"
    data: DataConfig = field(default_factory=DataConfig)
    model: dict = field(default_factory=dict)
    pretrain: dict = field(default_factory=dict)
    sft: dict = field(default_factory=dict)
    grpo: dict = field(default_factory=dict)
    distill: dict = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path, **overrides) -> "RunConfig":
        """From YAML; `overrides` that are None are ignored. Raises `MamaError` for unknown or missing keys."""
        path = Path(path)
        if not path.is_file():
            raise MamaError(f"`config` is {str(path)!r}, which is no file: try configs/demo.yaml.")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise MamaError(f"{path} holds no settings: a recipe for `mama run` is a YAML mapping.")
        values.update({key: value for key, value in overrides.items() if value is not None})
        data = values.pop("data", {})
        _refuse_unknown(values, cls, str(path))
        _refuse_unknown(data, DataConfig, f"{path}, section data,")
        values.setdefault("output_dir", f"runs/{path.stem}")
        config = cls(**values, data=DataConfig(**data))
        check_sparsity(config.sparsity)
        return config


def _refuse_unknown(values: dict, cls, where: str) -> None:
    known = [f.name for f in fields(cls)]
    for key in values:
        if key not in known:
            raise MamaError(f"{where} has the unknown key {key!r}: known are {', '.join(known)}.")


class Run:
    """The folder of one run and what its stages share."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.folder = Path(config.output_dir)
        self.cuda = torch.cuda.is_available()

    # ---- finished stages

    def path(self, stage: str) -> Path:
        return self.folder / ("model" if stage == "distill" else stage)

    def finished(self, stage: str) -> Optional[dict]:
        path = self.path(stage) / "stage.json"
        return json.loads(path.read_text()) if path.exists() else None

    def perform(self, stage: str, work: Callable[[], dict]) -> dict:
        """Runs `work` unless the stage is done; its result, with seconds, goes to stage.json last of all."""
        done = self.finished(stage)
        if done is not None:
            return done
        shutil.rmtree(self.path(stage), ignore_errors=True)
        self.path(stage).mkdir(parents=True)
        set_seed(self.config.seed)
        began = time.perf_counter()
        facts = work()
        facts = {"name": stage, "seconds": round(time.perf_counter() - began, 1), **facts}
        path = self.path(stage) / "stage.json"
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(facts)))
        return facts

    # ---- what stages share

    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.path("data"))

    def rows(self) -> dict[str, torch.Tensor]:
        return load_file(self.path("data") / "rows.safetensors")

    def sums(self) -> arithmetic.Sums:
        return arithmetic.sums(self.config.data.operands_from, self.config.data.operands_below, self.config.seed)

    def calibration(self) -> torch.Tensor:
        rows = self.rows()
        half = self.config.data.calibration_blocks // 2
        return torch.cat([rows["calibration_text"][:half], rows["calibration_task"][:half]])

    def load(self, stage: str):
        model = AutoModelForCausalLM.from_pretrained(self.path(stage), dtype=torch.float32)
        return model.cuda() if self.cuda else model

    def arguments(self, cls, stage: str, given: dict, **defaults):
        common = {
            "output_dir": str(self.path(stage)),
            "seed": self.config.seed,
            "use_cpu": not self.cuda,
            "bf16": False,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "logging_steps": 10,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 20,
        }
        known = {f.name for f in fields(cls)}
        for key in given:
            if key not in known:
                raise MamaError(f"section {stage} has the unknown key {key!r}: it takes the fields of {cls.__name__}.")
        return cls(**{**{k: v for k, v in common.items() if k in known}, **defaults, **given})

    def evaluate(self, model) -> dict:
        """Perplexity on held-out text and accuracy on held-out operands."""
        tokenizer, pairs = self.tokenizer(), self.sums().heldout
        measured = perplexity(model, self.rows()["heldout"])
        accuracy = task_accuracy(
            model, tokenizer, [p for p, _ in pairs], [a for _, a in pairs], arithmetic.correct
        )
        return {"perplexity": measured["perplexity"], "accuracy": accuracy["accuracy"]}


def run_pipeline(config_path: str | Path, overwrite: bool = False, **overrides) -> Path:
    """Runs or goes on with a recipe; returns the path of report.html.

    Raises `MamaError` if the output folder holds something else and `overwrite` is false.
    """
    config = RunConfig.read(config_path, **overrides)
    run = Run(config)
    _claim(run, overwrite)
    check_arguments(run)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    disable_progress_bar()  # "Loading weights" would interrupt the stages' own bars
    for number, (stage, work) in enumerate(
        [
            ("data", _data), ("pretrain", _pretrain), ("sft", _sft), ("grpo", _grpo), ("distill", _distill),
            ("baselines", _baselines),
        ],
        start=1,
    ):
        label = f"{number}/{len(STAGES)} {stage}"
        if run.finished(stage):
            print(f"{label}: done before")
        else:
            run.perform(stage, lambda: work(run, label))
    print(f"{len(STAGES)}/{len(STAGES)} report")
    return _report(run)


def check_arguments(run: Run) -> None:
    """Builds every stage's arguments once, so that a mistake shows before any compute is spent."""
    _sft_arguments(run, "pretrain")
    _sft_arguments(run, "sft")
    grpo_arguments(run)
    _distill_arguments(run, "distill")
    LlamaConfig(**run.config.model)


def _claim(run: Run, overwrite: bool) -> None:
    """Writes run.json; refuses a folder with other contents, or with a run of other settings."""
    settings = json.loads(json.dumps(asdict(run.config)))
    path = run.folder / "run.json"
    if overwrite and run.folder.exists():
        shutil.rmtree(run.folder)
    if path.exists():
        if json.loads(path.read_text()) != settings:
            raise MamaError(
                f"`output_dir` {run.folder} holds a run with other settings: choose another folder, or give "
                "--overwrite to delete it."
            )
    elif run.folder.exists() and any(run.folder.iterdir()):
        raise MamaError(
            f"`output_dir` {run.folder} holds something else: choose another folder, or give --overwrite to delete it."
        )
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(settings, indent=1)))


# ---------------------------------------------------------------------------------------------- the stages


def _data(run: Run, label: str) -> dict:
    data, seed = run.config.data, run.config.seed
    with StageBar.plain(label, 4) as bar:
        text = corpus.standard_library(seed, max_characters=data.characters)
        bar.update()
        tokenizer = train_tokenizer(text.train, data.vocab_size)
        tokenizer.save_pretrained(run.path("data"))
        bar.update()
        length = data.sequence_length
        train = blocks(tokenizer, "\n\n".join(text.train), length, seed=seed)
        heldout = blocks(tokenizer, "\n\n".join(text.heldout), length, limit=data.evaluation_blocks)
        bar.update()
        task, labels = arithmetic.demonstrations(tokenizer, run.sums().train, len(train), length, seed)
        half = data.calibration_blocks // 2
        save_file(
            {
                "calibration_text": train[:half].contiguous(),
                "calibration_task": task[:half].contiguous(),
                "text": train[half:].contiguous(),
                "task": task[half:].contiguous(),
                "task_labels": labels[half:].contiguous(),
                "heldout": heldout.contiguous(),
            },
            run.path("data") / "rows.safetensors",
        )
        bar.update()
    return {"steps": 0, "tokens": train.numel(), "corpus": text.facts, "task": run.sums().facts}


def _sft_arguments(run: Run, stage: str) -> SFTConfig:
    return run.arguments(
        SFTConfig, stage, getattr(run.config, stage), dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None, packing=False,
    )


def _dataset(run: Run, steps: int, batch: int, task_share: float) -> Dataset:
    """Enough shuffled sequences for `steps` batches, `task_share` of them from the task."""
    rows = run.rows()
    need = steps * batch
    generator = torch.Generator().manual_seed(run.config.seed)
    from_task = round(need * task_share)
    inputs, labels = [], []
    for name, label, count in (("task", "task_labels", from_task), ("text", "text", need - from_task)):
        chosen = torch.randperm(len(rows[name]), generator=generator)
        chosen = chosen.repeat(-(-count // len(chosen)))[:count]
        inputs.append(rows[name][chosen])
        labels.append(rows[label][chosen])
    order = torch.randperm(need, generator=generator)
    columns = {"input_ids": torch.cat(inputs)[order].tolist(), "labels": torch.cat(labels)[order].tolist()}
    return Dataset.from_dict(columns)


def _train(trainer, label: str) -> list[dict]:
    """Trains with one progress bar; returns the log history."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StageBar(label))
    trainer.train()
    return trainer.state.log_history


def _finish(run: Run, stage: str, trainer, **facts) -> dict:
    trainer.save_model(str(run.path(stage)))
    run.tokenizer().save_pretrained(run.path(stage))
    tokens = trainer.state.log_history[-1].get("num_tokens") or next(
        (row["num_tokens"] for row in reversed(trainer.state.log_history) if "num_tokens" in row), 0
    )
    return {"steps": trainer.state.global_step, "tokens": int(tokens), **facts}


def _record_only(run: Run, stage: str) -> MamaCallback:
    return MamaCallback(MamaConfig(sparsity=0.0), stage=stage)


def _pretrain(run: Run, label: str) -> dict:
    tokenizer = run.tokenizer()
    shape = {
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "hidden_size": 128,
        "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 2 * run.config.data.sequence_length, **run.config.model,
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None, **shape,
        )
    )
    return _supervised(run, "pretrain", label, model, 0.0)


def _sft(run: Run, label: str) -> dict:
    return _supervised(run, "sft", label, run.load("pretrain"), run.config.data.task_share)


def _supervised(run: Run, stage: str, label: str, model, task_share: float) -> dict:
    args = _sft_arguments(run, stage)
    trainer = SFTTrainer(
        model, args=args, processing_class=run.tokenizer(), callbacks=[_record_only(run, stage)],
        train_dataset=_dataset(run, args.max_steps, args.per_device_train_batch_size, task_share),
    )
    history = _train(trainer, label)
    loss = [[row["step"], row["loss"]] for row in history if "loss" in row]
    return _finish(run, stage, trainer, loss=loss, **run.evaluate(trainer.model))


def grpo_arguments(run: Run) -> MamaGRPOConfig:
    return run.arguments(
        MamaGRPOConfig, "grpo", run.config.grpo, sparsity=run.config.sparsity, logging_steps=1,
        max_completion_length=4, lr_scheduler_type="constant_with_warmup", warmup_steps=2,
    )


def _grpo(run: Run, label: str) -> dict:
    prompts = Dataset.from_list([{"prompt": p, "answer": a} for p, a in run.sums().train])
    trainer = MamaGRPOTrainer(
        run.load("sft"), [arithmetic.correct], args=grpo_arguments(run), train_dataset=prompts,
        processing_class=run.tokenizer(), calibration=run.calibration(),
    )
    history = _train(trainer, label)
    curve = [[row["step"], row["reward"]] for row in history if "reward" in row]
    sparsity = [[row["step"], row["mama/sparsity"]] for row in history if "reward" in row]
    facts = {"reward": curve, "sparsity_history": sparsity, "mask_step": trainer.mama.schedule.start}
    return _finish(run, "grpo", trainer, **facts, **run.evaluate(trainer.model))


def _distill_arguments(run: Run, stage: str) -> MamaDistillationConfig:
    return run.arguments(
        MamaDistillationConfig, stage, run.config.distill, sparsity=run.config.sparsity,
        dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, packing=False,
    )


def _distilled(run: Run, stage: str, label: str, model) -> tuple[MamaDistillationTrainer, list]:
    args = _distill_arguments(run, stage)
    trainer = MamaDistillationTrainer(
        model, teacher_model=run.load("sft"), args=args, processing_class=run.tokenizer(),
        train_dataset=_dataset(run, args.max_steps, args.per_device_train_batch_size, run.config.data.task_share),
    )
    history = _train(trainer, label)
    return trainer, [[row["step"], row["loss"]] for row in history if "loss" in row]


def _distill(run: Run, label: str) -> dict:
    trainer, loss = _distilled(run, "distill", label, run.load("grpo"))
    packed = save_packed(trainer.model, trainer.mama.masks, run.path("distill") / "packed" / "model.safetensors")
    return _finish(
        run, "distill", trainer, loss=loss, sparsity=trainer.mama.sparsity, bytes_packed=packed,
        by_matrix=sparsity_by_matrix(trainer.model), **run.evaluate(trainer.model),
    )


def _baselines(run: Run, label: str) -> dict:
    """Each baseline from the same dense teacher, same calibration tokens, same distillation."""
    results, losses, steps, tokens = {}, {}, 0, 0
    for method in (*BASELINES, "mama"):
        model = run.load("sft")
        masks = prune(model, run.calibration().to(model.device), method, run.config.sparsity, progress=False)
        oneshot = {"sparsity": masks.sparsity(), **run.evaluate(model)}
        if method == "mama":
            results[method] = {"oneshot": oneshot}  # without reward or distillation, for reference
            continue
        folder = run.path("baselines") / method
        model.save_pretrained(folder)
        masks.save(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(model.device)
        trainer, losses[method] = _distilled(run, "baselines", f"{label} ({method})", model)
        distilled = {"sparsity": trainer.mama.sparsity, **run.evaluate(trainer.model)}
        results[method] = {"oneshot": oneshot, "distilled": distilled}
        steps += trainer.state.global_step
        tokens += trainer._total_train_tokens
        shutil.rmtree(folder)
    return {"steps": steps, "tokens": int(tokens), "results": results, "loss": losses}


# ---------------------------------------------------------------------------------------------- the report


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "transformers", "trl", "accelerate", "datasets", "safetensors", "tokenizers", "mama_trl")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _report(run: Run) -> Path:
    facts = {stage: run.finished(stage) for stage in STAGES[:-1]}
    dense, grpo, final, baselines = facts["sft"], facts["grpo"], facts["distill"], facts["baselines"]
    data, tokenizer = run.config.data, run.tokenizer()
    model, teacher = run.load("distill"), run.load("sft")
    masks = MaskSet.load(run.path("distill"))
    prompts = [p for p, _ in run.sums().heldout[:3]] + ["def __init__(self", "import "]
    # A sum's completion ends with its line; the models would go on with the next one.
    samples = [
        [text.split("\n")[0] if prompt.endswith("=") else text for prompt, text in zip(prompts, texts)]
        for texts in (generate(teacher, tokenizer, prompts, 16), generate(model, tokenizer, prompts, 16))
    ]
    measured = ("perplexity", "accuracy")
    calibration_tokens = run.calibration().numel()
    distill_steps = final["steps"]
    report = {
        "title": run.config.title,
        "versions": _versions(),
        "seed": run.config.seed,
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "cuda": run.cuda},
        "corpus": facts["data"]["corpus"],
        "task": facts["data"]["task"],
        "model": {
            "parameters": model.num_parameters(),
            "prunable": sum(row["size"] for row in final["by_matrix"]),
            "config": {"architecture": type(model).__name__, "hidden_size": model.config.hidden_size,
                       "layers": model.config.num_hidden_layers, "vocabulary": model.config.vocab_size},
        },
        "protocol": {
            "sequence_length": data.sequence_length,
            "tokens": run.rows()["heldout"].shape[0] * (data.sequence_length - 1),
            "perplexity": "held-out files joined by a blank line, cut into blocks; positions 1 to the end of each "
            "block are scored",
            "task_prompts": len(run.sums().heldout),
            "task": "greedy completions of prompts whose operand pairs were never seen in training",
            "calibration_tokens": calibration_tokens,
            "calibration": "half text, half task, the same tokens for every method",
        },
        "budgets": {
            "mama": f"{grpo['steps']} GRPO steps with one mask update, then {distill_steps} distillation steps",
            "baselines": f"one-shot pruning of the same dense teacher, then the same {distill_steps} distillation "
            "steps; no GRPO",
        },
        "stages": [
            {"name": f["name"], "seconds": f["seconds"], "steps": f["steps"], "tokens": f["tokens"]}
            for f in facts.values()
        ],
        "sparsity": run.config.sparsity,
        "dense": {**{k: dense[k] for k in measured}, "bytes": model_bytes(run.path("sft"))},
        "pruned": {
            "sparsity": final["sparsity"],
            **{k: final[k] for k in measured},
            "bytes": model_bytes(run.path("distill")),
            "bytes_packed": final["bytes_packed"],
        },
        "baselines": {name: baselines["results"][name] for name in BASELINES},
        "mama_stages": {
            "oneshot": {k: baselines["results"]["mama"]["oneshot"][k] for k in measured},
            "grpo": {k: grpo[k] for k in measured},
            "distilled": {k: final[k] for k in measured},
        },
        "history": {
            "sparsity": grpo["sparsity_history"],
            "reward": grpo["reward"],
            "distill_loss": {"mama": final["loss"], **baselines["loss"]},
        },
        "sparsity_by_matrix": final["by_matrix"],
        "attribution": attribution_histogram(run.path("grpo")),
        "trajectory": trajectory_curves(run.path("distill"), masks),
        "samples": [{"prompt": p, "dense": d, "pruned": s} for p, d, s in zip(prompts, *samples)],
    }
    write_atomically(run.folder / "report.json", lambda temporary: temporary.write_text(json.dumps(report, indent=1)))
    return write_report(report, run.folder)
