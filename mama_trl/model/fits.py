"""Whether what is asked for can be had of a model's matrices, before anything is computed."""

from ..config import PruningOptions
from ..errors import MamaError
from .targets import Target


def check_fits(targets: list[Target], options: PruningOptions) -> None:
    """Raises `MamaError` naming the first matrix whose rows a pattern does not divide, or that is too narrow for a
    sparsity within its rows, since one connection of each must stay."""
    if options.sparsity == 0:
        return
    for target in targets:
        inputs = target.shape[1]
        if options.nm and inputs % options.nm[1]:
            raise MamaError(
                f"`pattern` is {options.pattern!r}, but {target.name} has {inputs} inputs, no multiple of "
                f"{options.nm[1]}: put it into `exclude_modules`, or use unstructured."
            )
        if options.scope == "row" and not options.nm and round(inputs * options.sparsity) >= inputs:
            raise MamaError(
                f"`sparsity` is {options.sparsity:g} with `scope` row, but a row of {target.name} has {inputs} inputs, "
                f"one of which stays: use at most {1 - 1 / inputs:.4g}, or scope matrix."
            )
