"""Statistics of a run: by hand, whatever the loss scale, and without bad gradients."""

import torch
from transformers import Trainer, TrainerCallback

from mama_trl import MamaCallback, MamaConfig
from mama_trl.model.targets import find_targets

from ..helpers import arguments, dataset


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
