"""Layer groups, goals and the two streams of a block."""

import pytest
import torch

from mama_trl.calibration import plan, stagewise
from mama_trl.calibration.plan import OUTPUT
from mama_trl.calibration.progress import Progress
from mama_trl.model.targets import find_targets
from mama_trl.pruning.prune import prune


@pytest.mark.parametrize("architecture, writers", [
    ("llama", {"o_proj": "post_attention_layernorm", "down_proj": OUTPUT}),
    ("gpt2", {"attn.c_proj": "ln_2", "mlp.c_proj": OUTPUT}),
    ("opt", {"out_proj": "final_layer_norm", "fc2": OUTPUT}),
    ("gpt_neox", {"attention.dense": OUTPUT, "dense_4h_to_h": OUTPUT}),
])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writers_to_the_residual_stream_are_found(make_model, rows, architecture, writers, dtype):
    """Before anything is pruned a writer's goal is exactly its own output, and so is a reader's."""
    model = make_model(architecture).to(dtype).eval()
    found, seen = {}, []

    targets = find_targets(model)
    for measured in stagewise.stagewise(model, rows[:6], targets, Progress("test", shown=False), batch_size=4):
        seen.extend(measured.targets)
        for target in measured.targets:
            if target.name in measured.goals:
                goal, gram = measured.goals[target.name], measured.grams[target.name]
                bias = 0.0 if target.bias is None else target.bias.float().outer(gram.total)
                expected = target.matrix.float() @ gram.gram + bias
                limit = 1e-3 if dtype == torch.float32 else 0.2
                assert (goal.cross - expected).norm() <= limit * expected.norm(), target.name
                found[target.module_name] = goal
    assert {t.name for t in seen} == {t.name for t in targets} and len(seen) == len(targets)
    for name in writers:
        assert sum(module.endswith(name) for module in found) == 2, name
    assert len(found) == len(targets)  # in these architectures every layer has a goal


@pytest.mark.parametrize("architecture, startable", [
    ("llama", True), ("qwen3", True), ("mixtral", True), ("opt", False), ("gpt2", False), ("gpt_neox", False),
])
def test_starting_a_block_behind_its_attention_changes_nothing(
    make_model, rows, monkeypatch, architecture, startable
):
    """The streams move through a block in two halves where they can; in one piece the result is the same."""
    halves, piece = make_model(architecture).eval(), make_model(architecture).eval()
    cut = []
    original = stagewise.startable_segments
    monkeypatch.setattr(
        stagewise, "startable_segments", lambda found: cut.append(len(original(found))) or original(found)
    )
    ours = prune(halves, rows[:8], sparsity=0.6, batch_size=3, progress=False)
    assert set(cut) == {2 if startable else 1}
    monkeypatch.setattr(plan, "_startable", lambda *_: None)
    theirs = prune(piece, rows[:8], sparsity=0.6, batch_size=3, progress=False)
    assert cut[-1] == 1
    for name in ours.names:
        differ = (ours.mask(name) != theirs.mask(name)).float().mean()
        assert differ < 0.01, name
    for a, b in zip(halves.parameters(), piece.parameters()):
        assert (a - b).norm() <= 0.02 * b.norm() + 1e-6
    assert all("forward" not in vars(module) for module in halves.modules())
