"""The callback with masks on in every other trainer of TRL: no zero comes back, nothing that is logged is lost."""

import pytest

from mama_trl import MamaCallback, MamaConfig

from .runs import MASKED, SAVED, check_masks, keys
from .test_same_as_parent import WITH_CALLBACK, trainer_with

OPTIONS = {
    "dpo": [
        {}, {"loss_type": ["ipo"]}, {"loss_type": ["hinge"]}, {"loss_type": ["sigmoid", "sft"]}, {"padding_free": True},
        {"precompute_ref_log_probs": True}, {"gradient_checkpointing": True}, {"use_weighting": True},
    ],
    "kto": [{}, {"loss_type": "apo_zero_unpaired"}],
    "reward": [{}, {"center_rewards_coefficient": 0.1}],
    "rloo": [{}, {"num_iterations": 2}, {"steps_per_generation": 2}],
    "distillation": [{}, {"beta": 0.0}, {"beta": 0.5}, {"gradient_accumulation_steps": 2, "num_train_epochs": 4}],
}


def try_trainer(kind: str, options: dict, folder) -> None:
    logged = {}
    for name, callbacks in (("theirs", []), ("ours", [MamaCallback(MamaConfig(**MASKED))])):
        trainer = trainer_with(kind, folder / name, callbacks, **SAVED, **options)
        trainer.train()
        logged[name] = keys(trainer)
    check_masks(trainer, folder / "ours")
    assert logged["theirs"] <= logged["ours"], f"lost: {logged['theirs'] - logged['ours']}"


@pytest.mark.parametrize("kind", [kind for kind in WITH_CALLBACK if kind != "sft"])
def test_trainer(kind, tmp_path):
    try_trainer(kind, {}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, options", [(kind, each) for kind, some in OPTIONS.items() for each in some if each], ids=str
)
def test_trainer_with_options(kind, options, tmp_path):
    try_trainer(kind, options, tmp_path)
