"""`MamaDistillationTrainer`: forward KL from the dense teacher on a fixed corpus, masks held or adapting."""

from typing import Optional

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from ...engines.frozen import prepared
from ...errors import MamaError
from ...model.sequences import Sequences
from ..callback import MamaCallback
from ..checks import check_arguments, check_source
from ..drop_in import config_for, from_training_arguments, signature_of
from ..integrations import PruningCard
from ..trl_private import note, note_tokens
from .config import MamaDistillationConfig
from .losses import cross_entropy, entropy_and_hits, forward_kl
from .teacher import check_vocabulary, load_teacher, student_config


class MamaDistillationTrainer(PruningCard, SFTTrainer):
    """Distillation into a pruned student. What differs from `trl.SFTTrainer`:

    - the loss is KL(teacher ‖ student) per token that SFT would train on, plus `cross_entropy_weight` times
      the cross-entropy of `loss_type`; `mama/kl` is logged beside SFT's own numbers;
    - a `MamaCallback` takes up the masks saved beside the student and keeps pruned connections at zero.

    Args:
        As in `trl.SFTTrainer`, in the same order; `args` may be a `SFTConfig`, too. By keyword:
        teacher_model: a model, a directory or a hub id; default `args.teacher_model_name_or_path`.
        calibration: as in `MamaCallback`; only needed when masks adapt.

    Raises:
        MamaError: no teacher, or one with another vocabulary; adapters; an option that would have no effect.
    """

    _tag_names = ["trl", "sft", "distillation", "mama", "pruning"]

    @signature_of(SFTTrainer)
    def __init__(
        self, arguments: dict, *, teacher_model: Optional[str | PreTrainedModel] = None,
        calibration: Optional[Sequences] = None,
    ):
        model, args = arguments["model"], arguments["args"]
        if isinstance(args, (str, PreTrainedModel)):
            raise MamaError("`args` is a model: give the teacher by name, as `teacher_model=`.")
        args = from_training_arguments(args, SFTConfig)
        args = config_for(args, model, MamaDistillationConfig, SFTConfig, "SFT")
        check_arguments(arguments)
        _check_loss(args, arguments)
        if isinstance(model, str):
            check_source(model, args.model_init_kwargs, args.trust_remote_code)
        teacher = load_teacher(teacher_model, args)
        config = student_config(model, args)
        if config is not None:
            check_vocabulary(config, teacher)
        self.mama = MamaCallback(args, calibration, stage="distill")
        callbacks = [self.mama, *(arguments["callbacks"] or [])]
        super().__init__(**{**arguments, "args": args, "callbacks": callbacks})
        check_vocabulary(self.model.config, teacher)  # a chat template may have added tokens to the student's
        parallel = self.accelerator.parallelism_config
        if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
            raise MamaError(
                "`parallelism_config` cuts sequences into parts, which the loss against a teacher does not know: set "
                "its `cp_size` and `sp_size` to 1."
            )
        self.teacher_model = prepared(teacher.requires_grad_(False).eval(), self)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        inputs = {**inputs, "use_cache": False}
        labels = inputs.pop("labels")
        with torch.no_grad():
            teacher_logits = self.teacher_model(**inputs).logits
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        outputs = model(**inputs)
        # Position t predicts token t + 1.
        trained = labels[:, 1:] != -100
        student, teacher = outputs.logits[:, :-1][trained], teacher_logits[:, :-1][trained]
        wanted = labels[:, 1:][trained]
        divergence = forward_kl(student, teacher, self.args.temperature).sum()
        total = divergence
        if self.args.cross_entropy_weight:
            smoothing, dft = self.args.label_smoothing_factor, self.args.loss_type == "dft"
            total = total + self.args.cross_entropy_weight * cross_entropy(student, wanted, smoothing, dft).sum()
        count = trained.sum() if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(count).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # `num_items_in_batch` counts every rank's tokens, and the gradients are averaged over ranks.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled:
            # A mean over this batch: with `num_items_in_batch` the Trainer leaves accumulation to the loss.
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
            note(self, mode, {"aux_loss": self._gathered(outputs.aux_loss.detach()).mean().item()})
        self._note(mode, inputs, divergence, student, wanted)
        return (loss, outputs) if return_outputs else loss

    def _note(self, mode: str, inputs: dict, divergence: Tensor, student: Tensor, wanted: Tensor) -> None:
        """What SFTTrainer logs of a batch, and the divergence; over all ranks. Tokens count as far as they went in."""
        entropy, hits = entropy_and_hits(student.detach(), wanted)
        tokens = torch.tensor(len(wanted), device=student.device)
        sums = [self._gathered(value).sum() for value in (tokens, entropy, hits, divergence.detach())]
        tokens, *sums = (float(value) for value in sums)
        names = ("entropy", "mean_token_accuracy", "mama/kl")
        note(self, mode, {name: value / tokens if tokens else 0.0 for name, value in zip(names, sums)})
        seen = None
        if mode == "train":
            mask = inputs.get("attention_mask")
            own = inputs["input_ids"].numel() if mask is None or mask.dim() != 2 else int(mask.sum())
            seen = int(self._gathered(torch.tensor(own, device=student.device)).sum())
        note_tokens(self, mode, seen)

    def _gathered(self, value: Tensor) -> Tensor:
        return self.accelerator.gather_for_metrics(value)


def _check_loss(args: MamaDistillationConfig, arguments: dict) -> None:
    """Raises `MamaError` for what SFT takes and this loss would silently leave out."""
    if arguments.get("compute_loss_func") is not None:
        raise MamaError("`compute_loss_func` is given, but the loss is the divergence from the teacher: leave it out.")
    plain = ("nll", "chunked_nll")
    if args.loss_type not in (*plain, "dft"):
        raise MamaError(f"`loss_type` is {args.loss_type!r}: use nll or dft.")
    smoothed = args.label_smoothing_factor > 0
    for name, given in (("loss_type", args.loss_type not in plain), ("label_smoothing_factor", smoothed)):
        if given and not args.cross_entropy_weight:
            raise MamaError(
                f"`{name}` is {getattr(args, name)!r}, which shapes the cross-entropy, but `cross_entropy_weight` is "
                "0: set it above 0, or leave the other out."
            )
    if smoothed and args.loss_type not in plain:
        raise MamaError("`label_smoothing_factor` has no effect with `loss_type` dft: leave one of them out.")
