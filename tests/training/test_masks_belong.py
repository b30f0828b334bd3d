"""Masks belong to weights: they are taken up where the weights are zero, and saved wherever the model is saved."""

import copy
import gc
import pickle
import shutil
import weakref

import pytest
import torch
from transformers import LlamaForCausalLM

from mama_trl import MamaCallback, MamaConfig, MamaError, MaskSet, prune
from mama_trl.masks.known import known
from mama_trl.model.targets import find_targets
from tests.conftest import tiny
from tests.training import saved
from tests.training.runs import shares, train, trainer_of

HOLD = MamaConfig(mask_schedule="hold")


def pruned_folder(rows, folder, sparsity=0.5, seed=0):
    """A folder with a model of this sparsity and its masks."""
    model = tiny("llama", seed=seed)
    prune(model, rows[:8], "magnitude", sparsity, progress=False)
    model.save_pretrained(folder)
    return folder


def load(folder):
    return LlamaForCausalLM.from_pretrained(folder)


def zero_out(model, share, seed=0):
    """What another tool leaves: zeros, and no masks."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for target in find_targets(model):
            target.parameter[torch.rand(target.parameter.shape, generator=generator) < share] = 0.0
    return model


# ---------------------------------------------------------------------- the object in memory comes first


def test_an_object_pruned_further_goes_on_with_its_last_masks(rows, tmp_path):
    model = load(pruned_folder(rows, tmp_path / "half"))
    train(model, rows, tmp_path / "more", MamaConfig(sparsity=0.9, mask_start=1))
    trainer, mama = train(model, rows, tmp_path / "held", HOLD, save=True)
    assert saved.sparsity(tmp_path / "held") == pytest.approx(0.9, abs=1e-3)
    assert mama.sparsity == pytest.approx(saved.sparsity(tmp_path / "held"), abs=1e-6)
    assert MaskSet.load(tmp_path / "held").digest() == mama.masks.digest()


def test_an_object_that_prune_changed_goes_on_with_those_masks(rows, tmp_path):
    model = load(pruned_folder(rows, tmp_path / "half"))
    prune(model, rows[:8], "magnitude", 0.8, progress=False)
    train(model, rows, tmp_path / "held", HOLD, save=True)
    assert saved.sparsity(tmp_path / "held") == pytest.approx(0.8, abs=1e-3)


def test_a_run_without_masks_leaves_an_object_without_masks(rows, tmp_path):
    """The folder's masks do not come back after a run that let the zeros grow."""
    model = load(pruned_folder(rows, tmp_path / "half"))
    train(model, rows, tmp_path / "dense", MamaConfig(sparsity=0.0, inherit_masks=False))
    _, mama = train(model, rows, tmp_path / "again", MamaConfig(sparsity=0.0))
    assert mama.masks is None


def test_statistics_follow_the_object(rows, tmp_path):
    model = tiny("llama")
    train(model, rows, tmp_path / "a", MamaConfig(sparsity=0.0))
    _, mama = train(model, rows, tmp_path / "b", MamaConfig(sparsity=0.0))
    assert int(mama.trajectory.counts["sensitivity"]) == 12


def test_masks_are_no_reason_for_a_model_to_stay(rows, tmp_path):
    model = tiny("llama")
    prune(model, rows[:8], "magnitude", 0.5, progress=False)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_copy_is_another_object(rows, tmp_path):
    model = load(pruned_folder(rows, tmp_path / "half"))
    prune(model, rows[:8], "magnitude", 0.8, progress=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert known(twin) is None
        with torch.no_grad():
            twin.model.layers[0].mlp.up_proj.weight.fill_(1.0)
        twin.save_pretrained(tmp_path / "twin")
        assert saved.raw_tensors(tmp_path / "twin")["model.layers.0.mlp.up_proj.weight"][2].min() > 0
        shutil.rmtree(tmp_path / "twin")


# ---------------------------------------------------------------------- masks of other weights


def test_masks_of_other_weights_are_refused_with_their_number(rows, tmp_path):
    pruned_folder(rows, tmp_path / "one")
    pruned_folder(rows, tmp_path / "twin", seed=5)
    tiny("llama", seed=3).save_pretrained(tmp_path / "dense")
    shutil.copytree(tmp_path / "one" / "mama", tmp_path / "dense" / "mama")
    for stem in ("mama",):
        shutil.rmtree(tmp_path / "twin" / stem)
        shutil.copytree(tmp_path / "one" / stem, tmp_path / "twin" / stem)
    for folder in ("dense", "twin"):
        with pytest.raises(MamaError, match=r"\d+ of \d+ connections.*not zero.*enforce_masks.*inherit_masks") as told:
            train(load(tmp_path / folder), rows, tmp_path / "out", HOLD)
        wrong, pruned = (int(word) for word in str(told.value).replace(" of ", " ").split()[:2])
        count, total = saved.zeros(tmp_path / "one")
        assert pruned == count and 0 < wrong <= pruned
        if folder == "dense":
            assert wrong == pruned
    _, mama = train(load(tmp_path / "dense"), rows, tmp_path / "free", MamaConfig(sparsity=0, inherit_masks=False))
    assert mama.masks is None


def test_weights_that_were_changed_in_memory_are_noticed(rows, tmp_path):
    model = load(pruned_folder(rows, tmp_path / "half"))
    train(model, rows, tmp_path / "a", HOLD)
    model.load_state_dict(tiny("llama", seed=4).state_dict())
    with pytest.raises(MamaError, match="this model object got last prune are not zero"):
        train(model, rows, tmp_path / "b", HOLD)


def test_a_fresh_merge_is_enforced_when_asked_for(rows, tmp_path, caplog):
    """As after `merge_and_unload`: the masks of the base model, and an adapter's product added to all weights."""
    model = load(pruned_folder(rows, tmp_path / "half"))
    with torch.no_grad():
        for target in find_targets(model):
            target.parameter.add_(1e-3)
    _, mama = train(model, rows, tmp_path / "out", MamaConfig(mask_schedule="hold", enforce_masks=True), save=True)
    assert saved.sparsity(tmp_path / "out") == pytest.approx(0.5, abs=1e-3) and mama.masks.verify(model) == 0
    assert "were not zero: they are now" in caplog.text
    with pytest.raises(MamaError, match="`enforce_masks` is True, but `inherit_masks` is False"):
        MamaConfig(enforce_masks=True, inherit_masks=False)


# ---------------------------------------------------------------------- saved wherever the model is saved


def save_in_the_middle(place):
    from transformers import TrainerCallback

    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                model.save_pretrained(place)

    return Save()


def test_masks_are_saved_wherever_the_model_is_saved(rows, tmp_path):
    trainer, mama = train(tiny("llama"), rows, tmp_path / "out", callbacks=[save_in_the_middle(tmp_path / "middle")])
    trainer.save_model(str(tmp_path / "trainers"))
    trainer.model.save_pretrained(tmp_path / "models")
    pruned = tiny("llama")
    prune(pruned, rows[:8], "magnitude", 0.75, progress=False)
    pruned.save_pretrained(tmp_path / "one-shot")
    for place in ("middle", "trainers", "models", "one-shot"):
        folder = tmp_path / place
        assert MaskSet.load(folder).sparsity() == pytest.approx(saved.sparsity(folder), abs=1e-9), place
        _, after = train(load(folder), rows, tmp_path / "next", HOLD, save=True)
        assert saved.sparsity(tmp_path / "next") == pytest.approx(0.75, abs=1e-3), place


def test_masks_saved_with_other_weights_say_so(rows, tmp_path, caplog):
    """Saved after something else has brought weights back, they are refused where they are taken up."""
    model = tiny("llama")
    prune(model, rows[:8], "magnitude", 0.75, progress=False)
    with torch.no_grad():
        find_targets(model)[0].parameter.add_(1.0)
    model.save_pretrained(tmp_path / "spoilt")
    assert "are not zero in what is saved" in caplog.text
    with pytest.raises(MamaError, match="not zero"):
        train(load(tmp_path / "spoilt"), rows, tmp_path / "next", HOLD)


# ---------------------------------------------------------------------- zeros that nobody knows of


def test_zeros_without_masks_are_held_when_asked_for(rows, tmp_path, caplog):
    zero_out(tiny("llama"), 0.7).save_pretrained(tmp_path / "theirs")
    before = saved.sparsity(tmp_path / "theirs")
    _, mama = train(load(tmp_path / "theirs"), rows, tmp_path / "held", HOLD, save=True)
    assert saved.sparsity(tmp_path / "held") == before == pytest.approx(mama.sparsity, abs=1e-9)
    assert shares(caplog.text)[0] == pytest.approx(before, abs=1e-4) and "these are held" in caplog.text
    with pytest.raises(MamaError, match="no masks lie beside.*0.00% of its weights are zero"):
        train(tiny("llama"), rows, tmp_path / "dense", HOLD)


def test_weights_pruned_further_by_another_tool_are_held_too(rows, tmp_path, caplog):
    """Half is masked; somebody zeroed more since the masks were saved."""
    pruned_folder(rows, tmp_path / "half")
    model = zero_out(load(tmp_path / "half"), 0.8)
    shutil.copytree(tmp_path / "half" / "mama", tmp_path / "more" / "mama")
    super(LlamaForCausalLM, model).save_pretrained(tmp_path / "more")
    before = saved.sparsity(tmp_path / "more")
    assert before > 0.85
    train(load(tmp_path / "more"), rows, tmp_path / "held", HOLD, save=True)
    assert saved.sparsity(tmp_path / "held") == before and "more than the masks knew" in caplog.text


@pytest.mark.parametrize("config", [MamaConfig(sparsity=0.0), MamaConfig(sparsity=0.8, mask_start=5)])
def test_zeros_that_training_would_let_grow_are_said_once(rows, tmp_path, caplog, config):
    zero_out(tiny("llama"), 0.6).save_pretrained(tmp_path / "theirs")
    before = saved.sparsity(tmp_path / "theirs")
    train(load(tmp_path / "theirs"), rows, tmp_path / "out", config)
    said = [record.getMessage() for record in caplog.records if "under no mask" in record.getMessage()]
    assert len(said) == 1 and shares(said[0])[0] == pytest.approx(before, abs=1e-4) and "hold" in said[0]
    caplog.clear()
    train(tiny("llama"), rows, tmp_path / "dense", config)
    assert "under no mask" not in caplog.text


def test_hold_refuses_more_than_there_is(rows, tmp_path):
    folder = pruned_folder(rows, tmp_path / "half")
    with pytest.raises(MamaError, match="`sparsity` is 0.9.*hold.*prune 0.5"):
        train(load(folder), rows, tmp_path / "out", MamaConfig(sparsity=0.9, mask_schedule="hold"))


# ---------------------------------------------------------------------- masks of a choice of matrices


def by_part(folder):
    """Share of zeros in attention and in the MLPs."""
    names = [name for name in saved.raw_tensors(folder) if name.endswith("proj.weight")]
    return tuple(saved.sparsity(folder, {name for name in names if part in name}) for part in (".self_attn.", ".mlp."))


def test_pruning_a_choice_of_matrices_leaves_the_others_masks_as_they_are(rows, tmp_path):
    """In a run, by its checkpoint, and by its next stage."""
    config = MamaConfig(sparsity=0.6, mask_start=2, exclude_modules=["mlp"])
    saving = {"save_strategy": "steps", "save_steps": 2}
    folder = pruned_folder(rows, tmp_path / "half")
    _, mama = train(load(folder), rows, tmp_path / "more", config, save=True, **saving)
    there = pytest.approx((0.6, 0.5), abs=1e-3)
    assert by_part(tmp_path / "more") == there and mama.sparsity == pytest.approx(0.6, abs=1e-3)
    shutil.rmtree(tmp_path / "more" / "checkpoint-6")
    newest = str(tmp_path / "more" / "checkpoint-4")
    train(load(folder), rows, tmp_path / "more", config, resume=newest, save=True, **saving)
    assert by_part(tmp_path / "more") == there
    train(load(tmp_path / "more"), rows, tmp_path / "held", HOLD, save=True)  # statistics start anew
    assert by_part(tmp_path / "held") == there


@pytest.mark.parametrize("in_memory", [False, True])
def test_prune_of_a_choice_of_matrices_keeps_the_others_masks(rows, tmp_path, in_memory):
    model = load(pruned_folder(rows, tmp_path / "half"))
    if in_memory:
        prune(model, rows[:8], "magnitude", 0.55, progress=False)
    masks = prune(model, rows[:8], "magnitude", 0.6, exclude_modules=["mlp"], progress=False)
    assert len(masks.names) == 14 and masks.verify(model) == 0
    model.save_pretrained(tmp_path / "more")
    train(load(tmp_path / "more"), rows, tmp_path / "held", MamaConfig(sparsity=0.0), save=True)
    assert by_part(tmp_path / "held") == pytest.approx((0.6, 0.55 if in_memory else 0.5), abs=2e-3)
    assert masks.digest() == MaskSet.load(tmp_path / "held").digest()
    # Of weights that are others by now nothing is kept.
    model.load_state_dict(tiny("llama", seed=5).state_dict())
    assert len(prune(model, rows[:8], "magnitude", 0.6, exclude_modules=["mlp"], progress=False).names) == 8


def test_experts_that_a_run_leaves_alone_stay_as_sparse_as_they_are(rows, tmp_path):
    model = tiny("mixtral")
    prune(model, rows[:8], "magnitude", 0.5, progress=False)
    model.save_pretrained(tmp_path / "half")
    config = MamaConfig(sparsity=0.7, mask_start=2)
    train(type(model).from_pretrained(tmp_path / "half"), rows, tmp_path / "more", config, save=True)
    names = {name for name in saved.raw_tensors(tmp_path / "more") if ".experts." in name}
    assert saved.sparsity(tmp_path / "more", names) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("others", [0.0, 0.5])
def test_hold_counts_and_keeps_matrices_that_the_masks_leave_out(rows, tmp_path, caplog, others):
    model = zero_out(tiny("llama"), others)
    prune(model, rows[:8], "magnitude", 0.6, target_modules=["mlp"], progress=False)
    model.save_pretrained(tmp_path / "some")
    before = by_part(tmp_path / "some")
    _, mama = train(load(tmp_path / "some"), rows, tmp_path / "held", HOLD, save=True)
    assert by_part(tmp_path / "held") == before and mama.missed is None
    assert mama.sparsity == pytest.approx(saved.sparsity(tmp_path / "held"), abs=1e-6)
    assert ("all of them are held" in caplog.text) == (others > 0)


def test_zeros_in_matrices_that_a_run_leaves_out_are_said(rows, tmp_path, caplog):
    zero_out(tiny("llama"), 0.6).save_pretrained(tmp_path / "theirs")
    config = MamaConfig(mask_schedule="hold", exclude_modules=["mlp"])
    train(load(tmp_path / "theirs"), rows, tmp_path / "out", config)
    (said,) = [record.getMessage() for record in caplog.records if "under no mask" in record.getMessage()]
    assert shares(said)[0] == pytest.approx(0.6 * 2 / 3, abs=0.01) and "leave `target_modules`" in said


# ---------------------------------------------------------------------- the state of the last run


def test_a_callback_used_for_a_second_trainer_starts_fresh(rows, tmp_path):
    mama = MamaCallback(MamaConfig(sparsity=0.5, mask_start=4))
    first, _ = train(tiny("llama"), rows, tmp_path / "a", mama=mama, save=True)
    masks = mama.masks.digest()
    second, _ = trainer_of(tiny("llama", seed=7), rows, tmp_path / "b", mama=mama)
    assert "mama/sparsity" not in second.evaluate()  # of a model that has no run yet
    assert not any("mama/sparsity" in row for row in second.state.log_history)
    second.train()
    second.save_model(str(tmp_path / "b"))
    logged = [row["mama/sparsity"] for row in second.state.log_history if "mama/sparsity" in row]
    assert logged[:3] == [0.0, 0.0, 0.0] and logged[-1] == pytest.approx(saved.sparsity(tmp_path / "b"), abs=1e-6)
    assert mama.masks.digest() != masks and mama.masks.verify(second.model) == 0
    assert MaskSet.load(tmp_path / "b").digest() == mama.masks.digest()
    assert saved.sparsity(tmp_path / "a") == pytest.approx(0.5, abs=1e-3)


def test_a_trainer_that_trains_twice_goes_on_with_its_masks(rows, tmp_path):
    trainer, mama = trainer_of(tiny("llama"), rows, tmp_path)
    trainer.train()
    masks = mama.masks.digest()
    mama.config = HOLD
    trainer.train()
    trainer.save_model(str(tmp_path))
    assert mama.masks.digest() == masks and saved.sparsity(tmp_path) == pytest.approx(0.75, abs=1e-3)


# ---------------------------------------------------------------------- numbers are the weights'


def test_the_number_logged_stored_and_printed_is_the_files(rows, tmp_path):
    """A model with zeros of its own, in places that stay: dead inputs, whose gradient is zero."""
    import json

    model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[:8] = 0.0
            layer.input_layernorm.requires_grad_(False)
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(layer.self_attn, name).weight[:, :8] = 0.0
    config = MamaConfig(sparsity=0.4, mask_start=2, indicators=["magnitude"], redistribution="none",
                        target_modules=["mlp", "o_proj", "q_proj"], exclude_modules=None, budget="uniform")
    trainer, mama = train(model, rows, tmp_path, config, save=True)
    names = {target.name for target in find_targets(model, config.target_modules)}
    file = saved.sparsity(tmp_path, names)
    state = json.loads((tmp_path / "mama" / "state.json").read_text())
    last = trainer.state.log_history[-1]
    for number in (mama.sparsity, last["mama/sparsity"], state["sparsity"], mama.card()["sparsity"]):
        assert number == pytest.approx(file, abs=1e-6)
    assert last["mama/mask_sparsity"] == pytest.approx(mama.masks.sparsity(), abs=1e-6) == state["mask_sparsity"]


def test_pruning_to_less_than_there_is_is_refused(rows, tmp_path):
    model = load(pruned_folder(rows, tmp_path / "half"))
    for options in ({"sparsity": 0.3}, {"pattern": "3:4"}):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(MamaError, match=r"0.5\d* of the prunable weights are zero already.*brought back"):
            prune(model, rows[:8], "mama", progress=False, **options)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    prune(model, rows[:8], "mama", 0.5, progress=False)
    assert prune(model, rows[:8], "mama", 0.6, progress=False).sparsity() == pytest.approx(0.6, abs=1e-3)


# ---------------------------------------------------------------------- one callback a trainer


def test_a_second_callback_is_refused(rows, tmp_path, tokenizer):
    from mama_trl import MamaGRPOConfig, MamaGRPOTrainer
    from tests.training.test_trainers import COMMON, lengths, prompts

    with pytest.raises(MamaError, match="two MamaCallbacks"):
        train(tiny("llama"), rows, tmp_path, callbacks=[MamaCallback(MamaConfig())])
    mama = MamaCallback(MamaConfig(sparsity=0.0))
    with pytest.raises(MamaError, match="two MamaCallbacks"):
        train(tiny("llama"), rows, tmp_path, mama=mama, callbacks=[mama])
    trainer, _ = trainer_of(tiny("llama"), rows, tmp_path)
    trainer.add_callback(MamaCallback(MamaConfig()))
    with pytest.raises(MamaError, match="two MamaCallbacks"):
        trainer.train()
    args = MamaGRPOConfig(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, num_generations=4,
                          max_completion_length=4, **COMMON)
    with pytest.raises(MamaError, match="two MamaCallbacks.*trainer.mama"):
        MamaGRPOTrainer(
            tiny("llama"), [lengths], args=args, train_dataset=prompts(), processing_class=tokenizer,
            callbacks=[MamaCallback(MamaConfig())],
        )
