"""One progress bar per stage, quiet on ranks above 0."""

from tqdm import tqdm
from transformers import TrainerCallback


class StageBar(TrainerCallback):
    """Replaces the Trainer's bar and printed logs by one labelled bar with the newest loss and reward."""

    def __init__(self, label: str):
        self._label = label
        self._bar = None

    @staticmethod
    def plain(label: str, total: int) -> tqdm:
        return tqdm(total=total, desc=label, unit="part")

    def on_train_begin(self, args, state, control, **kwargs):
        self._bar = tqdm(total=state.max_steps, desc=self._label, disable=not state.is_world_process_zero, unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._bar is not None and logs:
            shown = {key: f"{logs[key]:.3g}" for key in ("loss", "reward", "mama/sparsity") if key in logs}
            if shown:
                self._bar.set_postfix(shown)

    def on_train_end(self, args, state, control, **kwargs):
        self._bar.close()
