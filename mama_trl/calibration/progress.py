"""What a walk through a model's blocks tells and keeps."""

from typing import Optional

from torch import Tensor
from tqdm import tqdm

from ..model.targets import Target


class Progress:
    """A bar over the blocks; finished blocks are kept by subclasses (pruning/resume.py), here by nobody.

    `masks` are those of all that has been pruned, bool (out, in) by target name: whoever prunes puts its own here.
    """

    def __init__(self, label: str, shown: bool = True):
        self.masks: dict[str, Tensor] = {}
        self._label, self._shown = label, shown
        self._bar = tqdm(disable=True)

    def begin(self, blocks: int) -> None:
        self._bar = tqdm(total=blocks, desc=self._label, disable=not self._shown, unit="block")

    def advance(self) -> None:
        """One block has been walked through."""
        self._bar.update(1)

    def close(self) -> None:
        self._bar.close()

    def holds(self, targets: list[Target]) -> bool:
        """Whether an earlier run has pruned the block with these targets."""
        return False

    def restore(self, targets: list[Target], others: Optional[dict[str, Tensor]] = None) -> None:
        """Writes what the earlier run made of them into the model, and of `others` (the block's other parameters by
        name) as far as it changed them."""

    def finish(self, targets: list[Target], others: Optional[dict[str, Tensor]] = None) -> None:
        """All targets of a block are pruned, and `others` of its parameters have changed too."""
