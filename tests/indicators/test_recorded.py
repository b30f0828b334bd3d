"""One-shot pruning by what a training run left beside the model: statistics, Adam's second moments."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from mama_trl import MamaConfig, MamaError
from mama_trl.cli import main
from mama_trl.indicators.formulas import curvature
from mama_trl.indicators.recorded import recorded
from mama_trl.indicators.source import StoredScores
from mama_trl.masks.maskset import MaskSet
from mama_trl.model.targets import find_targets
from mama_trl.pruning.prune import prune
from mama_trl.selection.allocation import allocate
from mama_trl.selection.threshold import kept_count

from ..helpers import train
from ..tiny_tokenizer import tiny_tokenizer


@pytest.fixture
def trained(make_model, rows, tmp_path):
    """A checkpoint of a run that pruned nothing, its trainer and callback."""
    folder = tmp_path / "run"
    config = MamaConfig(sparsity=0.0, statistics=["sensitivity", "movement"])
    trainer, mama, _ = train(
        make_model("gpt2"), rows, folder, config, save_strategy="steps", save_steps=4, max_steps=4, weight_decay=0.1
    )
    return folder / "checkpoint-4", trainer, mama


def test_indicators_are_those_of_the_run(trained):
    folder, trainer, mama = trained
    model = AutoModelForCausalLM.from_pretrained(folder)
    targets = find_targets(model)
    found = recorded(str(folder), model, targets)
    assert set(found) == {"sensitivity", "movement", "curvature"}
    theirs = dict(trainer.model.named_parameters())
    for target in targets:
        moment = trainer.optimizer.state[theirs[target.name]]["exp_avg_sq"]
        expected = curvature(target.matrix.detach(), target.oriented(moment))
        assert torch.equal(found["curvature"][target.name], expected) and expected.abs().sum() > 0
        sensitivity = target.oriented(mama.trajectory.values["sensitivity"][target.name]).float()
        assert torch.equal(found["sensitivity"][target.name], sensitivity)


def test_each_indicator_can_be_switched_on(trained, rows):
    folder, _, _ = trained
    masks = {}
    for name in ("activation", "magnitude", "sensitivity", "movement", "curvature"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        targets = find_targets(model)
        scores = recorded(str(folder), model, targets)
        masks[name] = prune(model, rows[:8], sparsity=0.5, budget="uniform", redistribution="none", progress=False,
                            scores=StoredScores(scores), indicators=[name])
        if name == "curvature":
            for target in targets:  # by the score alone: exactly its largest
                kept = masks[name].mask(target.name)
                values = scores[name][target.name]
                kept = kept.t() if target.transposed else kept
                assert values[kept].min() >= values[~kept].max()
    assert len({found.digest() for found in masks.values()}) == len(masks)


def test_a_budget_from_scores_keeps_the_total(trained):
    folder, _, _ = trained
    model = AutoModelForCausalLM.from_pretrained(folder)
    targets = find_targets(model)
    scores, sizes = recorded(str(folder), model, targets), {t.name: t.shape[0] * t.shape[1] for t in targets}
    shares = dict(zip(sizes, allocate([scores["curvature"][name] for name in sizes], list(sizes.values()), 0.7, 0.6)))
    assert len(set(shares.values())) > 1
    kept = sum(kept_count(sizes[name], share) for name, share in shares.items())
    assert kept == kept_count(sum(sizes.values()), 0.7)


def test_another_models_optimizer_is_refused(trained, make_model, tmp_path):
    folder, _, _ = trained
    (tmp_path / "optimizer.pt").write_bytes((folder / "optimizer.pt").read_bytes())
    model = make_model("llama")
    with pytest.raises(MamaError, match="another model's or another trainer's optimizer"):
        recorded(str(tmp_path), model, find_targets(model))
    (tmp_path / "optimizer.pt").write_bytes(b"half")
    with pytest.raises(MamaError, match="optimizer.pt cannot be read"):
        recorded(str(tmp_path), model, find_targets(model))


def test_mama_prune_reads_them(tmp_path, capsys, rows):
    tokenizer = tiny_tokenizer()
    from transformers import LlamaConfig

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
        )
    )
    train(model, rows % len(tokenizer), tmp_path / "run", MamaConfig(sparsity=0.0), save_strategy="steps",
          save_steps=3, max_steps=3)
    source = tmp_path / "run" / "checkpoint-3"
    tokenizer.save_pretrained(source)
    (tmp_path / "text.txt").write_text("\n\n".join(f"{a} plus {b} makes {a + b}." for a in range(9) for b in range(9)))
    start = ["prune", str(source), "--calibration", str(tmp_path / "text.txt"), "--sparsity", "0.5"]
    digests = set()
    for number, options in enumerate((
        [], ["--indicators", "curvature"], ["--indicators", "sensitivity", "magnitude=0.5"],
        ["--budget", "curvature"], ["--redistribution", "none"], ["--scope", "row"],
    )):
        assert main([*start, *options, "--output", str(tmp_path / str(number))]) == 0, capsys.readouterr().err
        masks = MaskSet.load(tmp_path / str(number))
        assert masks.sparsity() == pytest.approx(0.5, abs=0.02)
        digests.add(masks.digest())
    assert len(digests) == 6
    for options, sentence in (
        (["--indicators", "reward"], "`indicators` has 'reward', which no training run left"),
        (["--budget", "reward"], "`budget` has 'reward', which no training run left"),
        (["--scope", "row", "--method", "wanda"], "`scope` is 'row', which method Wanda does not take"),
        (["--indicators", "magnitude", "--method", "wanda"], "`indicators` is ['magnitude'], which method Wanda does"),
    ):
        capsys.readouterr()
        assert main([*start, *options, "--output", str(tmp_path / "no")]) == 2
        assert sentence in capsys.readouterr().err
