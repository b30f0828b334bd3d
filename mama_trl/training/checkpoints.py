"""Which checkpoints of a run are whole.

A save that is killed leaves a folder that looks like a checkpoint. Every rank writes its files, then, after a
barrier, one of them writes `mama/state.json`: a checkpoint is whole when that file is there.
"""

import json
from pathlib import Path
from typing import Optional

from ..masks.files import FOLDER, STATE_FILE


def is_whole(checkpoint: str | Path) -> bool:
    """Whether the save of this checkpoint, by the Trainer and by `MamaCallback`, came to its end."""
    checkpoint = Path(checkpoint)
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        json.loads((checkpoint / FOLDER / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoint folders in `output_dir`, oldest first, whole or not."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        number = path.name.rpartition("-")[2]
        if path.is_dir() and number.isdigit():
            found.append((int(number), path))
    return [path for _, path in sorted(found)]


def newest_whole(output_dir: str | Path) -> Optional[Path]:
    return next((path for path in reversed(checkpoints(output_dir)) if is_whole(path)), None)


def cut_off(output_dir: str | Path) -> Optional[str]:
    """A sentence if the newest checkpoint was cut off while it was saved, and which one to use; else None."""
    found = checkpoints(output_dir)
    # Without any folder of ours the run had no MamaCallback, and nothing is known about its saves.
    if not found or is_whole(found[-1]) or not any((path / FOLDER).is_dir() for path in found):
        return None
    whole = newest_whole(output_dir)
    advice = f"resume from {whole}" if whole else "start from the beginning, since no earlier one is whole"
    return f"{found[-1]} is not whole: its save was cut off, or it was written without MamaCallback; {advice}."
