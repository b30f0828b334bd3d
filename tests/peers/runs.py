"""One training run: without masks beside the parent's, or with masks on and its saved files counted."""

import math
from pathlib import Path

from . import files

COMMON = dict(
    use_cpu=True, bf16=False, report_to=[], logging_steps=1, disable_tqdm=True, per_device_train_batch_size=4,
    gradient_checkpointing=False, max_steps=4, learning_rate=1e-2, seed=0,
)
SPARSITY = 0.5
MASKED = dict(sparsity=SPARSITY, mask_schedule="oneshot", mask_start=2)
SAVED = dict(save_strategy="steps", save_steps=2)
# Not numbers of the run, but of the clock.
TIMES = ("runtime", "per_second", "step_time", "flos", "memory")


def numbers(trainer) -> list[dict]:
    """The log without what depends on the clock, and without our own numbers."""
    return [
        {key: value for key, value in row.items() if not key.startswith("mama/") and not any(t in key for t in TIMES)}
        for row in trainer.state.log_history
    ]


def keys(trainer) -> set[str]:
    return {key for row in trainer.state.log_history for key in row}


def check_masks(trainer, folder) -> None:
    """After a masked run with `SAVED`: zeros in the files are those reported, and none has come back."""
    folder = Path(folder)
    trainer.save_model(str(folder / "final"))
    names = files.pruned_names(folder / "final")
    assert len(names) >= 6
    masked, last, final = (files.zeros_in(folder / name, names) for name in ("checkpoint-2", "checkpoint-4", "final"))
    assert files.share(masked) > SPARSITY - 0.02, "the mask did not come at its step"
    assert files.revived(masked, last) == files.revived(masked, final) == 0
    reported = [row["mama/sparsity"] for row in trainer.state.log_history if "mama/sparsity" in row][-1]
    assert abs(files.share(final) - reported) < 1e-3
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 4 and all(math.isfinite(loss) for loss in losses)
