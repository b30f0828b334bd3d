"""The pruning section of a model card."""

from pathlib import Path

from ..config import MamaConfig
from ..disk.writing import write_text

HEADING = "## Pruning"


def card_text(facts: dict) -> str:
    """Markdown: sparsity, protocol and numbers of `MamaCallback.card()`."""
    lines = [
        HEADING,
        "",
        f"{facts['sparsity']:.1%} of the linear weights are exactly zero ({facts['pattern']}), pruned with "
        "[MAMA](https://arxiv.org/abs/2505.14052) by `mama_trl` during training "
        f"(stage {facts['stage']}; indicators {facts['indicators']}; budget {facts['budget']}; redistribution "
        f"{facts['redistribution']}). The tensors are ordinary and dense; the masks lie in `mama/`.",
        "",
    ]
    if facts.get("missed"):
        lines += [f"**Not as sparse as asked for:** {facts['missed']}", ""]
    if facts["numbers"]:
        lines += [f"Measured by the Trainer's own evaluation, {facts['protocol']}:", ""]
        lines += ["| measure | value |", "|---|---|"]
        lines += [f"| {name} | {value:.6g} |" for name, value in facts["numbers"].items()]
        lines += [""]
    return "\n".join(lines)


def add_to_card(path: Path, facts: dict) -> None:
    """Appends the section to a README.md, replacing an earlier one."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    text = text.split(HEADING)[0].rstrip()
    write_text(path, f"{text}\n\n{card_text(facts)}" if text else card_text(facts))


def write_card(folder: str | Path, facts: dict) -> None:
    """`mama/README.md`, which every upload of `folder` carries."""
    write_text(Path(folder) / "mama" / "README.md", card_text(facts))


class CardFacts:
    """The numbers of the last evaluation, and what a model card tells beside them."""

    def __init__(self):
        self._numbers: dict = {}
        self._protocol = ""

    def take(self, args, state, metrics: dict | None) -> None:
        """Keeps an evaluation's numbers."""
        length = getattr(args, "max_length", None)
        self._protocol = f"evaluated at step {state.global_step}" + (f", sequences of {length}" if length else "")
        self._numbers = {key: value for key, value in (metrics or {}).items() if isinstance(value, (int, float))}

    def of(self, config: MamaConfig, sparsity: float, stage: str, missed: str | None = None) -> dict:
        """Sparsity (counted in the weights), pattern, how it was pruned, the last evaluation's numbers, and what is
        `missed` of the sparsity."""
        return {
            "sparsity": sparsity,
            "missed": missed,
            "pattern": config.pattern,
            "indicators": ", ".join(config.indicators),
            "budget": config.allocation,
            "redistribution": config.redistribution,
            "stage": stage,
            "protocol": self._protocol,
            "numbers": self._numbers,
        }
