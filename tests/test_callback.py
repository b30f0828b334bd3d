import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from mama_trl import MamaCallback, MamaConfig, MamaError, MaskSet
from mama_trl.model.targets import find_targets


class ZeroCheck(TrainerCallback):
    """Counts pruned connections that are not zero right after every optimizer step and at its end."""

    def __init__(self, mama):
        self.mama, self.steps, self.violations = mama, 0, 0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.mama.masks is not None:
            self.steps += 1
            self.violations += self.mama.masks.verify(model)


def arguments(folder, **changes):
    values = dict(
        output_dir=str(folder), use_cpu=True, max_steps=8, per_device_train_batch_size=4, logging_steps=1,
        learning_rate=1e-2, report_to=[], save_strategy="no", disable_tqdm=True, seed=0,
    )
    return TrainingArguments(**{**values, **changes})


def dataset(rows):
    return Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()}).with_format("torch")


def train(model, rows, folder, config, callbacks=(), resume=None, **changes):
    mama = MamaCallback(config)
    check = ZeroCheck(mama)
    trainer = Trainer(
        model, args=arguments(folder, **changes), train_dataset=dataset(rows), eval_dataset=dataset(rows[:4]),
        callbacks=[mama, check, *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, mama, check


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "opt"])
@pytest.mark.parametrize("schedule", ["oneshot", "cubic"])
def test_pruned_weights_are_zero_after_every_step(make_model, rows, tmp_path, architecture, schedule):
    ramp = {"mask_end": 6, "mask_interval": 2} if schedule == "cubic" else {}
    config = MamaConfig(sparsity=0.75, mask_schedule=schedule, mask_start=2, **ramp)
    model = make_model(architecture)
    trainer, mama, check = train(model, rows, tmp_path, config)
    assert check.steps >= 6 and check.violations == 0
    assert mama.sparsity == pytest.approx(0.75, abs=0.01)
    assert trainer.state.log_history[0]["mama/sparsity"] == 0.0
    assert trainer.state.log_history[-1]["mama/sparsity"] == pytest.approx(0.75, abs=0.01)
    assert MaskSet.load(tmp_path).digest() == mama.masks.digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"indicators": ["magnitude"], "redistribution": "none", "scope": "row"},
        {"indicators": ["magnitude", "sensitivity=0.5"], "redistribution": "none", "scope": "global"},
        {"scope": "row"},
        {"scope": "row", "redistribution": "mean", "indicators": ["activation", "sensitivity=0.5"]},
        {"indicators": ["curvature"], "redistribution": "none", "budget": "curvature"},
        {"indicators": ["movement"], "redistribution": "none", "statistics": ["movement"], "budget": "uniform"},
        {"indicators": ["activation", "sensitivity"], "redistribution": "mean"},
        {"pattern": "2:4"},
    ],
)
def test_indicators_scopes_and_patterns(make_model, rows, tmp_path, changes):
    config = MamaConfig(**{"sparsity": 0.5, "mask_start": 3, **changes})
    _, mama, check = train(make_model("llama"), rows, tmp_path, config)
    assert check.violations == 0 and mama.sparsity == pytest.approx(0.5, abs=0.02)
    if changes.get("scope") == "row":
        for name in mama.masks.names:
            assert len(mama.masks.mask(name).sum(1).unique()) == 1, name


def test_global_scope_with_redistribution_is_refused():
    with pytest.raises(MamaError, match="`scope` is 'global'.*set `redistribution` to none.*budget sensitivity"):
        MamaConfig(sparsity=0.5, scope="global")


def test_statistics_by_hand(make_model, rows, tmp_path):
    """One step: sensitivity is |w g| / ‖g‖ over all followed parameters, biases too."""
    model = make_model("gpt2")
    mama = MamaCallback(MamaConfig(sparsity=0.0))
    seen = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            followed = {n: p for n, p in model.named_parameters() if n in mama.trajectory.values["sensitivity"]}
            norm = torch.cat([p.grad.flatten() for p in followed.values()]).norm()
            seen.update({n: (p.data * p.grad / norm).abs() for n, p in followed.items()})

    trainer = Trainer(
        model, args=arguments(tmp_path, max_steps=1, max_grad_norm=0.01), train_dataset=dataset(rows),
        callbacks=[Look(), mama],
    )
    trainer.train()
    values = mama.trajectory.values["sensitivity"]
    assert any(name.endswith("bias") for name in values) and len(values) == len(seen)
    for name, expected in seen.items():
        assert values[name].dtype == torch.bfloat16
        assert torch.allclose(values[name].float(), expected, rtol=1e-2), name


def test_a_loss_scale_changes_no_statistic(make_model):
    """What DeepSpeed's fp16 shows before its step: gradients times the loss scale, in half precision, whose norm fp16
    itself could not hold."""
    from mama_trl.engines.detect import shards_of
    from mama_trl.indicators.trajectory import Trajectory

    found = []
    for scale, dtype in ((1.0, torch.float32), (2.0**16, torch.float32), (2.0**24, torch.float16)):
        model = make_model("llama").to(dtype)
        shards = shards_of((t.name, t.parameter) for t in find_targets(model))
        trajectory = Trajectory(shards, ["sensitivity", "reward", "movement"])
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for shard in shards:
                shard.parameter.grad = (torch.randn(shard.shape, generator=generator) * 1e-4 * scale).to(dtype)
            trajectory.record()
        found.append({f"{s} {n}": v.float() for s, values in trajectory.values.items() for n, v in values.items()})
    for name, value in found[0].items():
        assert value.abs().sum() > 0
        assert (found[1][name] - value).norm() < 1e-3 * value.norm(), name
        assert (found[2][name] - value).norm() < 1e-2 * value.norm(), name


def test_a_bad_gradient_is_left_out_and_counted(make_model, rows, tmp_path):
    model = make_model("llama")
    mama = MamaCallback(MamaConfig(sparsity=0.0))

    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                next(t.parameter for t in find_targets(model)).grad.fill_(float("nan"))
                mama.trajectory.record()
                for parameter in model.parameters():
                    parameter.grad = torch.zeros_like(parameter)

    trainer = Trainer(
        model, args=arguments(tmp_path, max_steps=4), train_dataset=dataset(rows), callbacks=[Poison(), mama]
    )
    trainer.train()
    assert int(mama.trajectory.skipped) == 1
    assert trainer.state.log_history[-1]["mama/skipped_steps"] == 1
    assert all(torch.isfinite(v).all() for v in mama.trajectory.values["sensitivity"].values())


def test_a_nan_weight_is_named(make_model, rows, tmp_path):
    model = make_model("llama")
    target = find_targets(model)[3]
    target.parameter.data[0, 0] = float("nan")
    with pytest.raises(MamaError, match=target.name.replace(".", r"\.")):
        train(model, rows, tmp_path, MamaConfig())


@pytest.mark.parametrize("schedule", ["oneshot", "cubic"])
def test_killed_and_resumed_gives_the_same_masks_and_weights(make_model, rows, tmp_path, schedule):
    ramp = {"mask_end": 7, "mask_interval": 3} if schedule == "cubic" else {}
    config = MamaConfig(sparsity=0.8, mask_schedule=schedule, mask_start=4, **ramp)
    changes = {"save_strategy": "steps", "save_steps": 3}
    whole, masks, _ = train(make_model("llama"), rows, tmp_path / "a", config, **changes)

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make_model("llama"), rows, tmp_path / "b", config, callbacks=[Kill()], **changes)
    resumed, again, check = train(make_model("llama", seed=9), rows, tmp_path / "b", config, resume=True, **changes)
    assert again.masks.digest() == masks.masks.digest() and check.violations == 0
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(a, b), name
    for name, value in masks.trajectory.values["sensitivity"].items():
        assert torch.equal(value, again.trajectory.values["sensitivity"][name]), name


def test_resuming_from_elsewhere(make_model, rows, tmp_path):
    """The Trainer tells nobody which checkpoint it was given: another run's masks must never be taken for its own."""
    config = MamaConfig(sparsity=0.5, mask_start=1)
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    train(make_model("llama"), rows, tmp_path / "a", config, **saving)
    train(make_model("llama", seed=3), rows, tmp_path / "b", config, **saving)
    source = str(tmp_path / "a" / "checkpoint-2")
    with pytest.raises(MamaError, match="at step 2 is not .*checkpoint-2.*set `resume_from_checkpoint`"):
        train(make_model("llama"), rows, tmp_path / "b", config, resume=source, max_steps=3)
    _, mama, check = train(
        make_model("llama"), rows, tmp_path / "b", config, resume=source, resume_from_checkpoint=source, max_steps=3
    )
    assert mama.masks.digest() == MaskSet.load(source).digest() and check.violations == 0


def test_resume_without_masks_is_refused(make_model, rows, tmp_path):
    config = MamaConfig(mask_start=2)
    train(make_model("llama"), rows, tmp_path, config, save_strategy="steps", save_steps=4)
    shutil.rmtree(tmp_path / "checkpoint-8" / "mama")
    with pytest.raises(MamaError, match="checkpoint-8 is not whole.*resume from .*checkpoint-4"):
        train(make_model("llama"), rows, tmp_path, config, resume=True, max_steps=10)


def test_the_next_stage_takes_up_masks_and_statistics(make_model, rows, tmp_path):
    trainer, first, _ = train(make_model("llama"), rows, tmp_path / "a", MamaConfig(sparsity=0.8, mask_start=2))
    trainer.save_model(str(tmp_path / "a"))
    load = type(trainer.model).from_pretrained
    _, second, check = train(
        load(tmp_path / "a"), rows, tmp_path / "b", MamaConfig(sparsity=0.8, mask_schedule="hold")
    )
    assert second.masks.digest() == first.masks.digest() and check.steps == 8 and check.violations == 0
    assert int(second.trajectory.counts["sensitivity"]) == 16
    assert [record["step"] for record in second.trajectory.history].count(0) == 2

    config = MamaConfig(sparsity=0.0, inherit_masks=False)
    _, third, _ = train(load(tmp_path / "a"), rows, tmp_path / "c", config)
    assert third.masks is None and int(third.trajectory.counts["sensitivity"]) == 8


def test_a_save_limit_of_one_is_refused(make_model, rows, tmp_path):
    with pytest.raises(MamaError, match="`save_total_limit` is 1.*set it to 2"):
        train(make_model("llama"), rows, tmp_path, MamaConfig(), save_strategy="steps", save_total_limit=1)


KILLED_SAVE = """
import os, sys
from pathlib import Path
import torch
from transformers import TrainerCallback
sys.path.insert(0, {root!r})
from mama_trl import MamaConfig, folders
from tests.conftest import tiny
from tests.test_callback import train

write, saves = folders.write_atomically, [0]

def dying(path, work):
    if "checkpoint-4" in str(path):
        saves[0] += 1
        if saves[0] == {when}:
            if {half}:
                path.parent.mkdir(exist_ok=True)
                work(path.with_name("half"))
            os.kill(os.getpid(), 9)
    write(path, work)

for name in ("masks.files", "training.inputs", "training.state"):
    setattr(sys.modules["mama_trl." + name], "write_atomically", dying)
rows = torch.randint(2, 384, (64, 24), generator=torch.Generator().manual_seed(0))
train(tiny("llama"), rows, {folder!r}, MamaConfig(sparsity=0.8, mask_start=5), save_strategy="steps", save_steps=2,
      save_total_limit=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("when,half", [(1, False), (1, True), (2, True), (3, False)])
def test_kill_9_while_saving_leaves_a_whole_checkpoint(make_model, tmp_path, caplog, when, half):
    """Killed at the first, second and last of our files, before and while it is written."""
    import subprocess
    import sys

    from mama_trl.training.checkpoints import cut_off, newest_whole

    root = str(Path(__file__).resolve().parents[1])
    code = KILLED_SAVE.format(root=root, when=when, half=half, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == -9, done.stderr[-2000:]
    assert newest_whole(tmp_path).name == "checkpoint-2"
    assert "checkpoint-4 is not whole" in cut_off(tmp_path) and "checkpoint-2" in cut_off(tmp_path)
    rows = torch.randint(2, 384, (64, 24), generator=torch.Generator().manual_seed(0))
    config = MamaConfig(sparsity=0.8, mask_start=5)
    changes = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    with pytest.raises(MamaError, match="checkpoint-4 is not whole.*resume from .*checkpoint-2"):
        train(make_model("llama"), rows, tmp_path, config, resume=str(tmp_path / "checkpoint-4"), **changes)
    resumed, again, _ = train(
        make_model("llama", seed=9), rows, tmp_path, config, resume=str(newest_whole(tmp_path)), **changes
    )
    whole, masks, _ = train(make_model("llama"), rows, tmp_path / "whole", config, **changes)
    assert again.masks.digest() == masks.masks.digest()
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values()):
        assert torch.equal(a, b)


def test_hold_without_masks_is_refused(make_model, rows, tmp_path):
    with pytest.raises(MamaError, match="no masks lie beside"):
        train(make_model("llama"), rows, tmp_path, MamaConfig(mask_schedule="hold"))


def test_masks_of_another_model_are_refused(make_model, rows, tmp_path):
    trainer, mama, _ = train(make_model("llama"), rows, tmp_path / "a", MamaConfig(mask_start=2))
    model = make_model("gpt2")
    model.save_pretrained(tmp_path / "gpt2")
    mama.masks.save(tmp_path / "gpt2")
    with pytest.raises(MamaError, match="belongs to another model"):
        train(type(model).from_pretrained(tmp_path / "gpt2"), rows, tmp_path / "b", MamaConfig())


def test_best_model_is_never_below_the_target(make_model, rows, tmp_path):
    """Pruning makes the loss worse, so the best loss of all is that of a dense checkpoint."""
    trainer, mama, _ = train(
        make_model("llama"), rows, tmp_path, MamaConfig(sparsity=0.9, mask_start=6),
        callbacks=[EarlyStoppingCallback(1)], load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, metric_for_best_model="loss",
    )
    assert trainer.state.global_step == 8
    assert trainer.state.best_model_checkpoint.endswith(("checkpoint-6", "checkpoint-8"))
    assert mama.masks.verify(trainer.model) == 0


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor"])
@pytest.mark.parametrize("changes", [{"indicators": ["curvature"], "redistribution": "none"}, {"budget": "curvature"}])
def test_curvature_without_second_moments_is_refused_after_the_first_step(
    make_model, rows, tmp_path, optimizer, changes
):
    config, model = MamaConfig(sparsity=0.5, mask_start=5, **changes), make_model("llama")
    with pytest.raises(MamaError, match="curvature.*keeps nothing"):
        train(model, rows, tmp_path, config, optim=optimizer)


def test_torch_compile(make_model, rows, tmp_path):
    _, mama, check = train(
        make_model("llama"), rows, tmp_path, MamaConfig(sparsity=0.5, mask_start=2), torch_compile=True,
        torch_compile_backend="eager", max_steps=4,
    )
    assert mama.sparsity == pytest.approx(0.5, abs=0.01) and check.violations == 0
    assert not any("_orig_mod" in name for name in mama.masks.names)


def test_a_push_carries_masks_card_and_weights(make_model, tokenizer, rows, tmp_path, monkeypatch):
    """The folder as it stands when the Trainer uploads it."""
    from trl import SFTConfig, SFTTrainer

    from mama_trl.training.integrations import connect

    uploaded = {}

    class Hub:
        def upload_folder(self, folder_path, **kwargs):
            folder = Path(folder_path)
            uploaded["files"] = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
            uploaded["card"] = (folder / "README.md").read_text()

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    args = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, max_steps=4, report_to=[], disable_tqdm=True,
        max_length=16, save_strategy="no", hub_model_id="someone/pruned",
    )
    data = Dataset.from_dict({"text": ["def f(x): return x + 1\n" * 4] * 8})
    trainer = SFTTrainer(
        make_model("llama"), args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer,
        callbacks=[MamaCallback(MamaConfig(sparsity=0.8, mask_start=2))],
    )
    trainer.hub_model_id = "someone/pruned"
    connect(trainer)
    assert isinstance(trainer.callback_handler.callbacks[1], MamaCallback)  # right behind the Trainer's own
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub()
    assert {"model.safetensors", "mama/masks.safetensors", "mama/state.json", "README.md"} <= uploaded["files"]
    for text in ("80.0%", "eval_loss", "evaluated at step 4, sequences of 16", "## Pruning"):
        assert text in uploaded["card"]


def test_the_model_card_tells_sparsity_and_numbers(make_model, rows, tmp_path):
    trainer, mama, _ = train(make_model("llama"), rows, tmp_path, MamaConfig(sparsity=0.8, mask_start=2))
    trainer.evaluate()
    mama.on_push_begin(trainer.args, trainer.state, trainer.control)
    card = (tmp_path / "mama" / "README.md").read_text()
    assert "80.0%" in card and "eval_loss" in card
    assert json.loads((tmp_path / "mama" / "state.json").read_text())["config"]["sparsity"] == 0.8
    trainer.save_model(str(tmp_path))
    assert "sparsity" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    "field,value",
    [
        ("sparsity", 1.0), ("sparsity", -0.1), ("sparsity", True), ("pattern", "3:2"), ("scope", "layer"),
        ("indicators", ["luck"]), ("indicators", []), ("indicators", ["magnitude=-1"]), ("budget", "mine"),
        ("budget_blend", 1.5), ("mask_schedule", "linear"), ("mask_start", -1), ("mask_interval", 0),
        ("redistribution", "sum"), ("calibration_tokens", 0), ("statistics", ["luck"]), ("target_modules", ["("]),
    ],
)
def test_bad_configuration_is_said_with_field_and_value(field, value):
    with pytest.raises(MamaError, match=field):
        MamaConfig(**{field: value})


def test_targets_that_match_nothing_and_adapters(make_model, rows, tmp_path):
    with pytest.raises(MamaError, match="target_modules.*nothing_like_this"):
        train(make_model("llama"), rows, tmp_path, MamaConfig(target_modules=["nothing_like_this"]))
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(MamaError, match="PEFT"):
        train(model, rows, tmp_path, MamaConfig())


def test_chosen_targets_only(make_model, rows, tmp_path):
    config = MamaConfig(sparsity=0.5, mask_start=2, target_modules=[r"mlp\."], exclude_modules=["down_proj"])
    _, mama, _ = train(make_model("llama"), rows, tmp_path, config)
    assert {name.split(".")[-2] for name in mama.masks.names} == {"gate_proj", "up_proj"}
