"""The names of TRL that are not public are still there: each failure says which version lost which, and what breaks."""

import inspect

import pytest
import trl

from mama_trl import MamaError, MamaGRPOConfig, MamaGRPOTrainer
from mama_trl.training import trl_private

from .peers import made

CONSEQUENCES = {
    trl_private.METRICS: "distillation could log nothing",
    trl_private.TRAIN_TOKENS: "distillation could not count its tokens",
    trl_private.TP_SIZE: "distillation could not count its tokens",
    trl_private.LAST_LOADED: "a vLLM sampler would answer with unpruned weights after a mask update",
    trl_private.REWARDS: "rewards that are no numbers would go by",
    trl_private.TAGS: "model cards would lack their tags",
    trl_private.NAME: "model cards would lack their title",
    trl_private.DICT_FIELDS: "the command line could not give mappings as JSON",
    **dict.fromkeys(trl_private.AUXILIARY, "distillation could not add a mixture's auxiliary loss"),
}


@pytest.mark.parametrize("trainer, name", [(t, n) for t, names in trl_private.USED.items() for n in names])
def test_trl_still_has(trainer, name):
    source = inspect.getsource(getattr(trl, trainer))
    assert f"self.{name}" in source or f"{name} =" in source or hasattr(getattr(trl, trainer), name), (
        f"TRL {trl.__version__} has no `{name}` in its {trainer} any more, so that {CONSEQUENCES[name]}: see "
        "mama_trl/training/trl_private.py."
    )


def test_trl_still_compares_the_step_its_sampler_has():
    """Setting it to -1 makes the sampler load: true only while it is compared with the step."""
    source = inspect.getsource(trl.GRPOTrainer)
    assert f"self.state.global_step != self.{trl_private.LAST_LOADED}" in source, (
        f"TRL {trl.__version__} decides otherwise when its sampler loads the weights: look how, and mend "
        "mama_trl/training/trl_private.py; until then it may answer with unpruned weights."
    )


def test_trl_still_loads_models_by_its_helper():
    from trl.trainer import utils

    assert hasattr(utils, trl_private.LOADER), (
        f"TRL {trl.__version__} has no `{trl_private.LOADER}` any more, so that a teacher cannot be loaded as TRL "
        "does: see mama_trl/training/trl_private.py."
    )


def grpo(folder):
    args = MamaGRPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], num_generations=4, per_device_train_batch_size=4
    )
    return MamaGRPOTrainer(
        made.model(), lambda completions, **_: [0.0] * len(completions), args, made.dataset("prompts"),
        processing_class=made.tokenizer(),
    )


def test_a_sampler_is_synced_after_a_mask_update_or_it_is_said(tmp_path):
    trainer = grpo(tmp_path)
    trainer.mama.on_masks_updated(3)  # no vLLM: nothing to do, and nothing to miss
    trainer.use_vllm, trainer._last_loaded_step = True, 3
    trainer.mama.on_masks_updated(3)
    assert trainer._last_loaded_step == -1
    del trainer._last_loaded_step
    with pytest.raises(MamaError, match="no `_last_loaded_step` in its MamaGRPOTrainer .* unpruned weights"):
        trainer.mama.on_masks_updated(4)


def test_nothing_private_is_named_elsewhere():
    from pathlib import Path

    package = Path(trl_private.__file__).resolve().parents[1]
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for name in (
            trl_private.METRICS, trl_private.TRAIN_TOKENS, trl_private.LAST_LOADED, trl_private.TP_SIZE,
            trl_private.DICT_FIELDS,
        ):
            assert path.name == "trl_private.py" or f".{name}" not in text, f"{path}: {name}"
        assert path.name == "trl_private.py" or "from trl.trainer" not in text, path
