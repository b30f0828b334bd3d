"""Building a model that no engine takes apart, in a run whose engine takes apart every new one (ZeRO-3)."""

import sys
from contextlib import contextmanager
from typing import Iterator

_SETTING = "_hf_deepspeed_config_weak_ref"  # transformers asks it whenever a model is made


@contextmanager
def undivided() -> Iterator[None]:
    """Models that are made within it are whole on this rank."""
    deepspeed = sys.modules.get("transformers.integrations.deepspeed")  # importing it would take seconds
    setting = getattr(deepspeed, _SETTING, None)
    if setting is not None:
        setattr(deepspeed, _SETTING, None)
    try:
        yield
    finally:
        if setting is not None:
            setattr(deepspeed, _SETTING, setting)
