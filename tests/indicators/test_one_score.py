"""One rule combines indicators: a mask update in training equals `prune` on the same statistics and calibration."""

from itertools import combinations

import pytest
import torch

from mama_trl import MamaConfig, prune
from mama_trl.config import INDICATORS, REDISTRIBUTIONS
from mama_trl.indicators import trajectory
from mama_trl.indicators.source import StoredScores
from mama_trl.pruning.update import Update, update_masks

from ..helpers import train


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def trained(request, tmp_path_factory):
    """A run of four steps that recorded everything, and what each connection's indicators are by their formulas."""
    from ..conftest import tiny

    rows = torch.randint(2, 384, (32, 24), generator=torch.Generator().manual_seed(0))
    config = MamaConfig(sparsity=0.0, statistics=["sensitivity", "movement", "reward"])
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        # In bf16 scores tie, and ties go by position in the parameter, which lies transposed in GPT-2.
        patch.setattr(trajectory, "DTYPE", torch.float32)
        trainer, mama, _ = train(tiny(request.param), rows, folder, config, max_steps=4)
    trainer.dense = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    run, scores = mama.run, {name: {} for name in ("sensitivity", "movement", "reward", "curvature")}
    for target in run.targets:
        for name in ("sensitivity", "movement", "reward"):
            value = run.trajectory.values[name][target.name].float()
            scores[name][target.name] = target.oriented(value.sqrt() if name == "reward" else value)
        moment = trainer.optimizer.state[target.parameter]["exp_avg_sq"]
        scores["curvature"][target.name] = target.oriented(target.parameter.detach() ** 2 * moment.sqrt())
    return trainer, mama, StoredScores(scores), rows[:8]


@pytest.mark.parametrize("redistribution", REDISTRIBUTIONS)
def test_training_and_one_shot_judge_alike(trained, redistribution):
    trainer, mama, scores, calibration = trained
    run = mama.run
    dense = trainer.dense
    shares = {target.name: 0.8 for target in run.targets}
    digests = set()
    for weights in [*[[name] for name in INDICATORS], *map(list, combinations(INDICATORS, 2))]:
        names = [weights[0], *(f"{name}=0.5" for name in weights[1:])]
        options = {"indicators": names, "redistribution": redistribution, "budget": "uniform"}
        run.model.load_state_dict(dense)
        update = Update(
            run.model, run.targets, run.shards, MamaConfig(sparsity=0.8, **options), run.trajectory,
            trainer.optimizer, calibration,
        )
        ours = update_masks(update, 0.8)
        after = {name: value.clone() for name, value in run.model.state_dict().items()}
        run.model.load_state_dict(dense)
        theirs = prune(
            run.model, calibration, sparsity=0.8, scores=scores, layer_sparsity=shares, progress=False, **options
        )
        for name in ours.names:
            assert torch.equal(ours.mask(name), theirs.mask(name)), (names, name)
        for name, value in run.model.state_dict().items():
            assert torch.equal(after[name], value), (names, name)
        digests.add(theirs.digest())
    assert len(digests) == len(INDICATORS) + 15  # every criterion chose other connections
