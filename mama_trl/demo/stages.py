"""The stages of a run: data, pre-training, SFT, GRPO, distillation, baselines."""

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PrinterCallback
from trl import SFTConfig, SFTTrainer

from ..config import MamaConfig
from ..disk.removal import MODEL_NAMES, remove_written
from ..errors import MamaError
from ..evaluation.size import sparsity_by_matrix
from ..evaluation.text import blocks
from ..export.packed import save_packed
from ..masks.tensors import write_tensors
from ..pruning.prune import prune
from ..training.callback import MamaCallback
from ..training.distillation.config import MamaDistillationConfig
from ..training.distillation.trainer import MamaDistillationTrainer
from ..training.grpo.config import MamaGRPOConfig
from ..training.grpo.trainer import MamaGRPOTrainer
from ..training.trl_private import tokens_seen
from . import arithmetic, corpus
from .progress import StageBar
from .recipe import BASELINES
from .run import Run
from .tokenizer import train_tokenizer


def data(run: Run, label: str) -> dict:
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
        if len(train) <= half:
            raise MamaError(
                f"`characters` is {data.characters}, which makes {len(train)} blocks of text, all of which "
                f"`calibration_blocks` ({data.calibration_blocks}) takes: raise the one or lower the other."
            )
        write_tensors(
            run.path("data") / "rows.safetensors",
            {
                "calibration_text": train[:half].contiguous(),
                "calibration_task": task[:half].contiguous(),
                "text": train[half:].contiguous(),
                "task": task[half:].contiguous(),
                "task_labels": labels[half:].contiguous(),
                "heldout": heldout.contiguous(),
            },
            {"format": "mama-rows-1"},
        )
        bar.update()
    return {"steps": 0, "tokens": train.numel(), "corpus": text.facts, "task": run.sums().facts}


def sft_arguments(run: Run, stage: str) -> SFTConfig:
    return run.arguments(
        stage, getattr(run.config, stage), dataset_kwargs={"skip_prepare_dataset": True},
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


def pretrain(run: Run, label: str) -> dict:
    tokenizer = run.tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None, **run.config.shape(),
        )
    )
    return _supervised(run, "pretrain", label, model, 0.0)


def sft(run: Run, label: str) -> dict:
    return _supervised(run, "sft", label, run.load("pretrain"), run.config.data.task_share)


def _supervised(run: Run, stage: str, label: str, model, task_share: float) -> dict:
    args = sft_arguments(run, stage)
    trainer = SFTTrainer(
        model, args=args, processing_class=run.tokenizer(), callbacks=[_record_only(run, stage)],
        train_dataset=_dataset(run, args.max_steps, args.per_device_train_batch_size, task_share),
    )
    history = _train(trainer, label)
    loss = [[row["step"], row["loss"]] for row in history if "loss" in row]
    return _finish(run, stage, trainer, loss=loss, **run.evaluate(trainer.model))


def grpo_arguments(run: Run) -> MamaGRPOConfig:
    return run.arguments(
        "grpo", run.config.grpo, sparsity=run.config.sparsity, logging_steps=1,
        max_completion_length=4, lr_scheduler_type="constant_with_warmup", warmup_steps=2,
    )


def grpo(run: Run, label: str) -> dict:
    prompts = Dataset.from_list([{"prompt": p, "answer": a} for p, a in run.sums().train])
    trainer = MamaGRPOTrainer(
        run.load("sft"), [arithmetic.correct], args=grpo_arguments(run), train_dataset=prompts,
        processing_class=run.tokenizer(), calibration=run.calibration(),
    )
    history = _train(trainer, label)
    curve = [[row["step"], row["reward"]] for row in history if "reward" in row]
    sparsity = [[row["step"], row["mama/sparsity"]] for row in history if "reward" in row]
    facts = {"reward": curve, "sparsity_history": sparsity, "mask_step": trainer.mama.regime.schedule.start}
    return _finish(run, "grpo", trainer, **facts, **run.evaluate(trainer.model))


def distill_arguments(run: Run, stage: str) -> MamaDistillationConfig:
    return run.arguments(
        stage, run.config.distill, sparsity=run.config.sparsity,
        dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, packing=False,
    )


def _distilled(run: Run, stage: str, label: str, model) -> tuple[MamaDistillationTrainer, list]:
    args = distill_arguments(run, stage)
    trainer = MamaDistillationTrainer(
        model, teacher_model=run.load("sft"), args=args, processing_class=run.tokenizer(),
        train_dataset=_dataset(run, args.max_steps, args.per_device_train_batch_size, run.config.data.task_share),
    )
    history = _train(trainer, label)
    return trainer, [[row["step"], row["loss"]] for row in history if "loss" in row]


def distill(run: Run, label: str) -> dict:
    trainer, loss = _distilled(run, "distill", label, run.load("grpo"))
    packed = save_packed(trainer.model, trainer.mama.masks, run.path("distill") / "packed" / "model.safetensors")
    return _finish(
        run, "distill", trainer, loss=loss, sparsity=trainer.mama.sparsity, bytes_packed=packed,
        by_matrix=sparsity_by_matrix(trainer.model), **run.evaluate(trainer.model),
    )


def baselines(run: Run, label: str) -> dict:
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
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        model = model.to(run.device)
        trainer, losses[method] = _distilled(run, "baselines", f"{label} ({method})", model)
        distilled = {"sparsity": trainer.mama.sparsity, **run.evaluate(trainer.model)}
        results[method] = {"oneshot": oneshot, "distilled": distilled}
        steps += trainer.state.global_step
        tokens += tokens_seen(trainer)
        remove_written(folder, MODEL_NAMES)
    return {"steps": steps, "tokens": int(tokens), "results": results, "loss": losses}
