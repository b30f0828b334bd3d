"""The pruning section of a model card."""

from pathlib import Path

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
    path.write_text(f"{text}\n\n{card_text(facts)}" if text else card_text(facts), encoding="utf-8")


def write_card(folder: str | Path, facts: dict) -> None:
    """`mama/README.md`, which every upload of `folder` carries."""
    path = Path(folder) / "mama" / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(card_text(facts), encoding="utf-8")
