"""`MamaDistillationTrainer`: forward KL from the dense teacher on a fixed corpus, masks held or adapting."""

from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import SFTTrainer

from ...engines.frozen import prepared
from ...errors import MamaError
from ...evaluation.weights import check_report
from ..callback import MamaCallback
from ..integrations import PruningCard
from .config import MamaDistillationConfig
from .losses import forward_kl


class MamaDistillationTrainer(PruningCard, SFTTrainer):
    """Distillation into a pruned student. What differs from `trl.SFTTrainer`:

    - the loss is KL(teacher ‖ student) per token that SFT would train on, plus `cross_entropy_weight` times
      the cross-entropy;
    - a `MamaCallback` takes up the masks saved beside the student and keeps pruned connections at zero.

    Args:
        teacher_model: a model, a directory or a hub id; default `args.teacher_model_name_or_path`.
        calibration: as in `MamaCallback`; only needed when masks adapt.
        Others as in `trl.SFTTrainer`.

    Raises:
        MamaError: no teacher, or a teacher with another vocabulary.
    """

    _tag_names = ["trl", "distillation", "mama", "pruning"]

    def __init__(
        self,
        model,
        teacher_model: Optional[str | PreTrainedModel] = None,
        args: Optional[MamaDistillationConfig] = None,
        *,
        calibration: Optional[Tensor] = None,
        **kwargs,
    ):
        args = args if args is not None else MamaDistillationConfig()
        if not isinstance(args, MamaDistillationConfig):
            raise MamaError(f"`args` is a {type(args).__name__}: this trainer takes a MamaDistillationConfig.")
        teacher_model = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
        if teacher_model is None:
            raise MamaError(
                "`teacher_model` is missing: give the dense model, or set `teacher_model_name_or_path` to it."
            )
        if isinstance(teacher_model, str):
            teacher_model = _loaded(teacher_model, args)
        if isinstance(model, str):
            model = _loaded(model, args)
        check_vocabulary(model, teacher_model)
        self.mama = MamaCallback(args, calibration, stage="distill")
        super().__init__(model, args=args, **kwargs)
        self.add_callback(self.mama)
        teacher_model.requires_grad_(False).eval()
        self.teacher_model = prepared(teacher_model, self)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if model.training else "eval"
        inputs = {**inputs, "use_cache": False}
        labels = inputs.pop("labels")
        with torch.no_grad():
            teacher_logits = self.teacher_model(**inputs).logits
        outputs = model(**inputs)
        # Position t predicts token t + 1.
        trained = labels[:, 1:] != -100
        student, teacher = outputs.logits[:, :-1][trained], teacher_logits[:, :-1][trained]
        divergence = forward_kl(student, teacher, self.args.temperature).sum()
        total = divergence
        if self.args.cross_entropy_weight:
            entropy = functional.cross_entropy(student.float(), labels[:, 1:][trained], reduction="sum")
            total = total + self.args.cross_entropy_weight * entropy
        tokens = trained.sum()
        count = tokens if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = total / count.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # `num_items_in_batch` counts every rank's tokens, and the gradients are averaged over ranks.
            loss = loss * self.accelerator.num_processes
        if mode == "train":
            # All tokens that went in, as SFTTrainer counts them; the loss is over the trained ones only.
            seen = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
            seen = torch.as_tensor(seen, device=tokens.device)
            self._total_train_tokens += int(self.accelerator.gather(seen).sum())
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        self._metrics[mode]["mama/kl"].append((divergence.detach() / tokens.clamp(min=1)).item())
        return (loss, outputs) if return_outputs else loss


def _loaded(source: str, args: MamaDistillationConfig) -> PreTrainedModel:
    """A model with all its weights and no code of its own unless asked. Raises `MamaError` if some do not fit."""
    options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    model, report = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    check_report(source, report)
    return model


def check_vocabulary(student: nn.Module, teacher: nn.Module) -> None:
    """Raises `MamaError` when the two models do not predict over the same vocabulary."""
    ours, theirs = student.config.vocab_size, teacher.config.vocab_size
    if ours != theirs:
        raise MamaError(
            f"`teacher_model` has a vocabulary of {theirs} tokens and the student one of {ours}: their "
            "distributions cannot be compared; choose a teacher with the student's tokenizer."
        )
