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


class PruningCard:
    """Mixin before a TRL trainer with a `mama` callback: its model card gets the pruning section."""

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_to_card(Path(self.args.output_dir) / "README.md", self.mama.card())

    def log(self, logs: dict, *args, **kwargs):
        """The sparsity joins the Trainer's own logs, so that every reporting integration sees it."""
        if self.mama.trajectory is not None:
            logs.update(self.mama.metrics())
        super().log(logs, *args, **kwargs)


def connect(trainer) -> None:
    """For a plain Trainer with a `MamaCallback`: metrics reach every integration, the model card tells of masks.

    A Trainer appends a user's callbacks behind W&B's and TensorBoard's, and all share one `logs` dictionary, so
    ours is moved to the front; and the card that `push_to_hub` writes gets the pruning section.
    """
    from .callback import MamaCallback

    callbacks = trainer.callback_handler.callbacks
    callbacks.sort(key=lambda callback: not isinstance(callback, MamaCallback))
    if hasattr(trainer, "mama") or not isinstance(callbacks[0], MamaCallback):
        return
    write = trainer.create_model_card

    def create_model_card(*args, **kwargs):
        write(*args, **kwargs)
        if trainer.is_world_process_zero():
            add_to_card(Path(trainer.args.output_dir) / "README.md", callbacks[0].card())

    trainer.create_model_card = create_model_card
