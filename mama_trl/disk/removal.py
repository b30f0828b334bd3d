"""Deletes what this package wrote, by the names it writes, and nothing else. Links are never followed, nor deleted."""

import fnmatch
import os
import re
from pathlib import Path
from typing import Mapping, Optional, Union

# A folder by its entries: None for a file, a mapping for a folder. Names are shell patterns; "..." stands for the
# mapping itself, once more.
Names = Mapping[str, Union[None, str, "Names"]]
AGAIN = "..."

# What transformers, TRL and `MamaCallback` leave in the folder of a trained model.
MODEL_NAMES: Names = {
    **dict.fromkeys((
        "config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors",
        "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "training_args.bin",
        "trainer_state.json", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state*.pth", "scaler.pt",
        "README.md", ".*.tmp",
    )),
    "mama": {
        **dict.fromkeys((
            "masks*.safetensors", "statistics*.safetensors", "inputs*.safetensors", "regime*.safetensors",
            "state.json", "README.md", ".*.tmp"
        )),
    },
    "checkpoint-*": AGAIN,
    "completions": {"completions_*.parquet": None},
    "runs": {"*": {"events.out.tfevents.*": None}},
}

# Weights, and what beside them need not be there again, as `save_pretrained` names them, and this package's masks;
# other people's files are none of these.
_MODEL_FILES = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)|(model\.safetensors|pytorch_model\.bin)\.index\.json"
    r"|chat_template\.jinja|generation_config\.json|added_tokens\.json|special_tokens_map\.json"
)
_MASK_FILES = re.compile(r"(masks|statistics|inputs|regime)(-\d+-of-\d+)?\.safetensors|state\.json")

MODEL_FILES = tuple(name for name, inner in MODEL_NAMES.items() if inner is None)


def remove_written(folder: str | Path, names: Names) -> list[Path]:
    """Deletes files of these names from a folder, then the folder if that leaves it empty.

    Returns:
        What stays, because it has another name, is a link, or cannot be deleted.
    """
    folder, stays = Path(folder), []
    if folder.is_symlink() or not folder.is_dir():
        return [folder] if os.path.lexists(folder) else []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        inner = _inner(entry.name, names)
        if inner is None and entry.is_file(follow_symlinks=False):
            try:
                path.unlink()
                continue
            except OSError:
                pass
        elif isinstance(inner, Mapping) and entry.is_dir(follow_symlinks=False):
            stays += remove_written(path, inner)
            continue
        stays.append(path)
    if not stays:
        try:
            folder.rmdir()
        except OSError:
            stays.append(folder)
    return stays


def _inner(name: str, names: Names) -> Optional[Union[bool, Names]]:
    """None for a file that is to go, a mapping for a folder, False for a name that is not ours."""
    for pattern, inner in names.items():
        if fnmatch.fnmatchcase(name, pattern):
            return names if inner == AGAIN else inner
    return False


def remove_model_files(folder: Path) -> None:
    """Removes an earlier model's weights and masks, so that stale shards never lie beside the new ones."""
    remove_weights(folder)
    _remove(folder / "mama", _MASK_FILES)


def remove_weights(folder: Path) -> None:
    """Removes an earlier model's weights."""
    _remove(folder, _MODEL_FILES)


def _remove(folder: Path, ours: re.Pattern) -> None:
    for entry in list(os.scandir(folder)) if folder.is_dir() and not folder.is_symlink() else ():
        if ours.fullmatch(entry.name) and not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.path)
