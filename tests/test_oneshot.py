import sys

import pytest
import torch

from mama_trl.calibration import plan, stagewise
from mama_trl.calibration.plan import OUTPUT
from mama_trl.calibration.progress import Progress
from mama_trl.config import default_blend
from mama_trl.errors import MamaError
from mama_trl.evaluation.perplexity import perplexity
from mama_trl.indicators.calibration_gradients import sensitivities
from mama_trl.indicators.combine import Criterion, weights_and_biases
from mama_trl.model.targets import find_targets
from mama_trl.pruning.prune import prune
from mama_trl.selection.allocation import allocate
from mama_trl.selection.patterns import row_mask
from mama_trl.selection.threshold import kept_count
from mama_trl.solvers.alps import alps, next_penalty
from mama_trl.solvers.magnitude import magnitude
from mama_trl.solvers.mama import mama
from mama_trl.solvers.methods import METHODS
from mama_trl.solvers.problem import Goal, Gram
from mama_trl.solvers.redistribution import bias_shift, layer_error, least_squares, mean
from mama_trl.solvers.sparsegpt import BLOCK, sparsegpt
from mama_trl.solvers.wanda import wanda


def layer(outputs=12, inputs=16, tokens=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator)
    samples = torch.randn(tokens, inputs, generator=generator) @ mixing
    return torch.randn(outputs, inputs, generator=generator), samples


def test_least_squares_equals_the_closed_form_on_each_support():
    weight, samples = layer()
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) > 0.5
    ours = least_squares(weight, samples.T @ samples, mask, steps=200, damping=0.0)
    for row in range(weight.shape[0]):
        support = mask[row].nonzero().squeeze(1)
        exact = torch.linalg.lstsq(samples[:, support].double(), (samples @ weight[row]).double().unsqueeze(1)).solution
        assert torch.allclose(ours[row, support].double(), exact.squeeze(1), atol=2e-3, rtol=2e-3)
    assert torch.all(ours[~mask] == 0)


def test_mean_moves_the_pruned_sum_of_each_row():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    mask = torch.tensor([[True, False, True, False]])
    assert mean(weight, mask).tolist() == [[4.0, 0.0, 6.0, 0.0]]


def test_bias_shift_keeps_the_mean_output():
    weight, samples = layer()
    samples = samples + 3.0
    kept = weight * (weight.abs() > 0.7)
    before = (samples @ weight.T).mean(0)
    after = (samples @ kept.T).mean(0) + bias_shift(weight, kept, samples.mean(0))
    assert torch.allclose(before, after, atol=1e-3)


def test_wanda_by_hand():
    weight = torch.tensor([[1.0, -5.0, 2.0, 3.0], [4.0, 1.0, -1.0, 2.0]])
    norm = torch.tensor([10.0, 1.0, 1.0, 2.0])
    pruned, _ = wanda(weight, norm, 0.5)
    assert pruned.tolist() == [[1.0, 0.0, 0.0, 3.0], [4.0, 0.0, 0.0, 2.0]]


def test_sparsegpt_equals_its_rule_written_out():
    """Optimal brain surgeon column by column with a fresh inverse of the remaining Hessian each time."""
    weight, samples = layer(outputs=4, inputs=6)
    gram = samples.T @ samples
    hessian = gram.double() + 0.01 * gram.diagonal().mean().double() * torch.eye(6, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    scores = (weight.double().square() / upper.diagonal().square()).flatten()
    mask = torch.ones(24, dtype=torch.bool)
    mask[scores.argsort()[:12]] = False
    mask = mask.view(4, 6)
    expected = weight.double().clone()
    for column in range(6):
        inverse = torch.linalg.inv(hessian[column:, column:])
        error = expected[:, column] * ~mask[:, column] / inverse[0, 0]
        expected[:, column:] -= error.unsqueeze(1) * inverse[0]
    ours, our_mask = sparsegpt(weight, gram, 0.5)
    assert torch.equal(our_mask, mask)
    assert torch.allclose(ours.double(), expected * mask, atol=1e-4, rtol=1e-3)


def obs_by_hand(weight, gram, mask_of):
    """SparseGPT's rule with a fresh inverse of the remaining Hessian at each column, in fp64.

    `mask_of(column, weights so far, diagonal of the factor)` gives new mask columns from `column` on, or None.
    """
    columns = weight.shape[1]
    hessian = gram.double() + 0.01 * gram.diagonal().mean().double() * torch.eye(columns, dtype=torch.float64)
    diagonal = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).diagonal()
    values, mask = weight.double().clone(), torch.ones(weight.shape, dtype=torch.bool)
    for column in range(columns):
        chosen = mask_of(column, values, diagonal)
        if chosen is not None:
            mask[:, column : column + chosen.shape[1]] = chosen
        inverse = torch.linalg.inv(hessian[column:, column:])
        error = values[:, column] * ~mask[:, column] / inverse[0, 0]
        values[:, column:] -= error.unsqueeze(1) * inverse[0]
    return values * mask, mask


def test_sparsegpt_chooses_the_mask_block_by_block_on_compensated_values():
    weight, samples = layer(outputs=3, inputs=BLOCK + 40, tokens=900)
    gram = samples.T @ samples

    def mask_of(column, values, diagonal):
        if column not in (0, BLOCK):
            return None
        inside = slice(column, min(column + BLOCK, values.shape[1]))
        scores = (values[:, inside] / diagonal[inside]).square()
        mask = torch.zeros(scores.numel(), dtype=torch.bool)
        mask[scores.flatten().argsort(descending=True)[: kept_count(scores.numel(), 0.6)]] = True
        return mask.view(scores.shape)

    expected, mask = obs_by_hand(weight, gram, mask_of)
    ours, our_mask = sparsegpt(weight, gram, 0.6)
    assert torch.equal(our_mask, mask)
    assert torch.allclose(ours.double(), expected, atol=1e-3, rtol=1e-2)


def test_sparsegpt_chooses_each_group_of_n_m_when_its_turn_comes():
    weight, samples = layer(outputs=5, inputs=12)
    gram = samples.T @ samples

    def mask_of(column, values, diagonal):
        if column % 4:
            return None
        scores = (values[:, column : column + 4] / diagonal[column : column + 4]).square()
        worst = scores.argsort(dim=1)[:, :2]
        return torch.ones(scores.shape, dtype=torch.bool).scatter_(1, worst, False)

    expected, mask = obs_by_hand(weight, gram, mask_of)
    ours, our_mask = sparsegpt(weight, gram, 0.5, (2, 4))
    assert torch.equal(our_mask, mask)
    assert torch.allclose(ours.double(), expected, atol=1e-4, rtol=1e-3)


def test_magnitude_by_hand():
    weight = torch.tensor([[1.0, -5.0, 2.0], [4.0, 0.5, -3.0]])
    assert magnitude(weight, 0.5)[0].tolist() == [[0.0, -5.0, 0.0], [4.0, 0.0, -3.0]]


def test_alps_penalty_schedule():
    """ρ grows by 1.3, 1.2 or 1.1 by the number of changed connections against 0.1 k, 0.005 k and 1."""
    assert [next_penalty(1.0, changed, 1000) for changed in (100, 99, 5, 4, 1, 0)] == [1.3, 1.2, 1.2, 1.1, 1.1, 1.0]


def test_alps_ends_at_the_optimum_of_its_support():
    """The values are least squares on the support, in the damped problem that ALPS solves."""
    weight, samples = layer(outputs=8, inputs=16)
    gram = samples.T @ samples
    new, mask = alps(weight, gram, 0.5)
    assert int(mask.sum()) == 64 and torch.all(new[~mask] == 0)
    damped = gram.double() + 0.01 * gram.diagonal().mean().double() * torch.eye(16, dtype=torch.float64)
    for row in range(8):
        support = mask[row].nonzero().squeeze(1)
        right = damped[support] @ weight[row].double()
        exact = torch.linalg.solve(damped[support][:, support], right)
        assert torch.allclose(new[row, support].double(), exact, atol=0.05, rtol=0.05)


def test_alps_moves_nothing_between_orthogonal_inputs():
    weight = torch.tensor([[1.0, -5.0, 2.0, 3.0], [4.0, 1.0, -1.0, 2.0]])
    new, mask = alps(weight, torch.diag(torch.tensor([100.0, 1.0, 1.0, 4.0])), 0.5)
    assert int(mask.sum()) == 4 and bool(mask[:, 0].all())  # the input a hundred times stronger is kept by both
    assert torch.allclose(new, weight * mask, atol=1e-4)


def test_alps_is_better_than_sparsegpt():
    weight, samples = layer(outputs=32, inputs=48)
    gram = samples.T @ samples
    for sparsity, group in ((0.5, None), (0.8, None), (0.5, (2, 4))):
        ours = layer_error(weight, alps(weight, gram, sparsity, group)[0], gram).sum()
        assert ours < layer_error(weight, sparsegpt(weight, gram, sparsity, group)[0], gram).sum()


@pytest.mark.parametrize("sparsity", [0.0, 0.005, 0.01])
def test_alps_where_nearly_everything_is_kept(sparsity):
    for seed in range(4):
        torch.manual_seed(seed)
        weight, samples = torch.randn(16, 32), torch.randn(200, 32)
        new, mask = alps(weight, samples.T @ samples, sparsity)
        assert torch.isfinite(new).all() and int(mask.sum()) == kept_count(512, sparsity)


def test_the_pass_of_gradients_leaves_gradients_alone(make_model, rows):
    model = make_model("llama")
    model(input_ids=rows[:2], labels=rows[:2]).loss.mul(100).backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    targets = find_targets(model)
    fresh = make_model("llama")
    theirs = sensitivities(fresh, rows[:4], find_targets(fresh))
    for name, value in sensitivities(model, rows[:4], targets).items():
        assert torch.equal(value, theirs[name])
    assert all(torch.equal(parameter.grad, before[name]) for name, parameter in model.named_parameters())


def test_mama_reads_calibration_of_every_kind(make_model, rows, monkeypatch):
    """It reads half of the blocks: where the first are text and the last a task, some of both."""
    seen = []
    original = stagewise.stagewise
    monkeypatch.setattr(
        sys.modules[prune.__module__], "stagewise",
        lambda model, rows, *rest: seen.append(rows) or original(model, rows, *rest),
    )
    kinds = torch.cat([rows[:32], rows[:32] * 0 + 7])
    prune(make_model("llama"), kinds, sparsity=0.5, progress=False)
    of_the_task = (seen[0] == 7).all(1)
    assert len(seen[0]) < 64 and of_the_task.sum() * 2 == len(seen[0])


def test_every_row_keeps_the_same_number_where_rows_compete():
    weight, samples = layer(outputs=12, inputs=32, tokens=400)
    gram = samples.T @ samples
    new, mask = mama(weight, gram, 0.75, by_row=True)
    assert mask.sum(1).tolist() == [8] * 12 and torch.all(new[~mask] == 0)
    row_wise = weight * row_mask(weight.abs() * gram.diagonal().sqrt(), 0.75)
    assert layer_error(weight, new, gram).sum() < layer_error(weight, row_wise, gram).sum()


def test_goals_let_a_layer_repair_what_its_inputs_lack():
    """With noisy inputs and the clean outputs as goal, the error is below that of repeating the dense weight."""
    weight, clean = layer(outputs=10, inputs=16, tokens=800)
    noisy = clean * 0.8 + 0.3 * clean.roll(1, dims=1)
    wanted = clean @ weight.T
    gram = noisy.T @ noisy
    plain, _ = mama(weight, gram, 0.3)
    ours, _ = mama(weight, gram, 0.3, cross=wanted.T @ noisy)
    assert (noisy @ ours.T - wanted).square().sum() < 0.5 * (noisy @ plain.T - wanted).square().sum()


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


def test_goal_of_inputs_by_hand():
    gram = Gram(torch.tensor([[4.0]]), torch.tensor([2.0]), 1)
    goal = Goal.of_inputs(torch.tensor([[3.0]]), torch.tensor([5.0]), torch.tensor([[6.0]]), torch.tensor([3.0]), gram)
    assert goal.cross.tolist() == [[3 * 6 + 5 * 2.0]] and goal.total.tolist() == [3 * 3 + 5.0]


def test_sensitivities_are_the_mean_of_w_times_g(make_model, rows):
    model = make_model("gpt2").eval()
    targets = find_targets(model)
    ours = sensitivities(model, rows[:8], targets, batch_size=4)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    expected = {t.name: torch.zeros(t.shape) for t in targets}
    for batch in rows[:8].split(4):
        model.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        for t in targets:
            expected[t.name] += (t.matrix * t.oriented(t.parameter.grad)).abs() / 2
    for name, value in expected.items():
        assert torch.allclose(ours[name].float(), value, rtol=0.05, atol=value.max().item() * 0.01)


def test_sensitivity_budget_keeps_the_total_and_differs(make_model, rows):
    model = make_model("llama")
    targets = find_targets(model)
    sizes = [t.shape[0] * t.shape[1] for t in targets]
    found = sensitivities(model, rows[:8], targets)
    shares = dict(zip([t.name for t in targets], allocate([found[t.name] for t in targets], sizes, 0.6, 0.5)))
    kept = sum(kept_count(t.shape[0] * t.shape[1], shares[t.name]) for t in targets)
    assert kept == kept_count(sum(t.shape[0] * t.shape[1] for t in targets), 0.6)
    assert len({round(value, 3) for value in shares.values()}) > 2
    masks = prune(model, rows[:8], sparsity=0.6, progress=False)
    assert masks.sparsity() == pytest.approx(0.6, abs=1e-4)
    blends = [default_blend("gradients", level) for level in (0.5, 0.95, 0.97, 0.99, 0.995)]
    assert blends == pytest.approx([0.6, 0.6, 0.3, 0.0, 0.0])


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "gemma2", "gpt_neox"])
def test_sensitivity_budget_on_other_architectures(make_model, rows, architecture):
    model = make_model(architecture)
    masks = prune(model, rows[:16], sparsity=0.6, progress=False)
    assert masks.verify(model) == 0 and masks.sparsity() == pytest.approx(0.6, abs=1e-3)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_criterion_is_a_geometric_mean():
    """As a score, and as what multiplies |w| ‖x‖ in a solver, with the exponent of ‖x‖ that the shares give it."""
    weight, norm = torch.tensor([[1.0, -4.0], [2.0, 1.0]]), torch.tensor([9.0, 4.0])
    inputs = Gram(torch.diag(norm**2), torch.zeros(2), 1)
    score = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    activation = weight.abs() * norm
    for weights, exponent, expected in (
        ({"activation": 1.0, "sensitivity": 1.0}, 0.5, (activation * score).sqrt()),
        ({"activation": 1.0, "magnitude": 3.0}, 0.25, weight.abs() * norm**0.25),
        ({"magnitude": 1.0}, 0.0, weight.abs()),
        ({"sensitivity": 2.0}, 0.0, score),
    ):
        criterion = Criterion(weights)
        found = {"sensitivity": score} if "sensitivity" in weights else {}
        assert criterion.input_exponent == exponent
        direct = criterion.score(weight, inputs, found)
        in_solver = activation * criterion.multiplier(weight, inputs, found)
        assert torch.allclose(direct / direct[0, 0], expected / expected[0, 0], rtol=1e-5)
        assert torch.allclose(in_solver / in_solver[0, 0], expected / expected[0, 0], rtol=1e-5)
    assert Criterion({"activation": 2.0}).multiplier(weight, inputs, {}) is None


def test_weights_and_biases_by_hand():
    weight = torch.tensor([[1.0, -4.0], [2.0, 1.0]])
    assert weights_and_biases(weight, torch.tensor([1.0, -3.0])).tolist() == [[1.5, 6.0], [5.0, 2.5]]
    assert weights_and_biases(weight, None).tolist() == [[1.0, 4.0], [2.0, 1.0]]


def test_sparsegpt_takes_an_exact_count_over_several_blocks():
    weight, samples = layer(outputs=10, inputs=300, tokens=900)
    _, mask = sparsegpt(weight, samples.T @ samples, 0.7)
    assert int(mask.sum()) == 900


def test_mama_loses_less_than_sparsegpt_and_wanda_and_is_exact():
    weight, samples = layer(outputs=32, inputs=48)
    gram = samples.T @ samples
    for sparsity in (0.5, 0.8):
        ours, mask = mama(weight, gram, sparsity)
        assert int(mask.sum()) == round(weight.numel() * (1 - sparsity))
        assert torch.all(ours[~mask] == 0)
        error = layer_error(weight, ours, gram).sum()
        assert error < layer_error(weight, sparsegpt(weight, gram, sparsity)[0], gram).sum()
        assert error < layer_error(weight, wanda(weight, gram.diagonal().sqrt(), sparsity)[0], gram).sum()


@pytest.mark.parametrize("case", ["dead input", "all dead", "fewer tokens than inputs", "one token"])
def test_degenerate_grams_give_finite_weights(case):
    weight, samples = layer()
    if case == "dead input":
        samples[:, 3] = 0
    elif case == "all dead":
        samples = samples * 0
    else:
        samples = samples[: 5 if case.startswith("fewer") else 1]
    gram = samples.T @ samples
    for solve in (mama, sparsegpt, alps):
        for group in (None, (2, 4)):
            new, mask = solve(weight, gram, 0.5, group)
            assert torch.isfinite(new).all() and int(mask.sum()) == weight.numel() // 2


def test_a_large_mean_beside_a_small_variance_gives_finite_weights(caplog):
    """Centring such a gram leaves rounding that is not positive definite."""
    weight, samples = layer()
    gram = Gram.zeros(16, "cpu")
    gram.add(samples * 1e-3 + 100.0)
    new, mask = mama(weight, gram.centred, 0.5)
    assert torch.isfinite(new).all() and int(mask.sum()) == weight.numel() // 2


def test_inputs_with_infinity_are_said(make_model, rows):
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[0] = float("inf")
    with pytest.raises(MamaError, match="NaN or infinity"):
        prune(model, rows[:4], "mama", 0.5, progress=False, budget="uniform")


def test_gram_counts_means_and_norms():
    gram = Gram.zeros(2, "cpu")
    gram.add(torch.tensor([[[3.0, 1.0], [4.0, 1.0]]]))
    assert gram.gram.tolist() == [[25.0, 7.0], [7.0, 2.0]] and gram.mean.tolist() == [3.5, 1.0]
    assert gram.norm.tolist() == pytest.approx([5.0, 2**0.5])
    assert torch.allclose(gram.centred, torch.tensor([[0.5, 0.0], [0.0, 0.0]]), atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "opt"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_architecture(make_model, rows, architecture, method):
    model = make_model(architecture)
    embedding = model.get_input_embeddings().weight.clone()
    masks = prune(model, rows[:16], method, 0.6, progress=False)
    assert masks.verify(model) == 0
    assert set(masks.names) == {t.name for t in find_targets(model)}
    assert masks.sparsity() == pytest.approx(0.6, abs=0.02)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert torch.isfinite(torch.tensor(perplexity(model, rows[:4])["nats"]))


def test_blockwise_forward_is_the_models_own(make_model, rows):
    """With sparsity 0 the last block's calibration inputs are those of an ordinary forward pass."""
    from mama_trl.calibration.blockwise import blockwise
    from mama_trl.calibration.grams import collect

    for architecture in ("llama", "gpt2", "opt", "qwen3"):
        model = make_model(architecture).eval()
        targets = find_targets(model)
        seen = {}
        for measured in blockwise(model, rows[:6], targets, Progress("test", shown=False), batch_size=4):
            seen.update(measured.grams)
        with torch.no_grad():
            plain = collect(model, targets, lambda: model(input_ids=rows[:6]))
        for name, gram in plain.items():
            assert torch.allclose(seen[name].gram, gram.gram, rtol=1e-3, atol=1e-3), (architecture, name)


@pytest.mark.parametrize("method", METHODS)
def test_two_of_four(make_model, rows, method):
    model = make_model("llama")
    masks = prune(model, rows[:8], method, pattern="2:4", progress=False)
    for target in find_targets(model):
        groups = masks.mask(target.name).view(target.shape[0], -1, 4)
        assert torch.all(groups.sum(-1) == 2)


@pytest.mark.parametrize("redistribution", ["none", "mean", "bias", "least_squares"])
def test_redistribution_modes(make_model, rows, redistribution):
    model = make_model("opt" if redistribution == "bias" else "llama")
    dense = {t.name: t.matrix.clone() for t in find_targets(model)}
    masks = prune(model, rows[:16], "mama", 0.5, redistribution=redistribution, progress=False)
    changed = any(
        not torch.equal(t.matrix[masks.mask(t.name)], dense[t.name][masks.mask(t.name)]) for t in find_targets(model)
    )
    assert changed == (redistribution in ("mean", "least_squares"))
    assert masks.verify(model) == 0


def test_bf16_weights_stay_bf16(make_model, rows):
    model = make_model("llama").bfloat16()
    prune(model, rows[:8], "mama", 0.5, progress=False)
    assert all(p.dtype == torch.bfloat16 and torch.isfinite(p).all() for p in model.parameters())


def test_bad_input_is_said(make_model, rows):
    for arguments, word in [
        ({"method": "obd"}, "method"),
        ({"sparsity": 1.2}, "sparsity"),
        ({"pattern": "4:2"}, "pattern"),
        ({"redistribution": "sum"}, "redistribution"),
        ({"redistribution": "bias"}, "no layer to prune has one"),
        ({"scope": "global"}, "scope"),
        ({"scope": "row", "method": "wanda"}, "`scope` is 'row', which method Wanda does not take"),
        ({"indicators": ["reward"]}, "which no training run left"),
        ({"budget": "reward"}, "which no training run left"),
    ]:
        with pytest.raises(MamaError, match=word):
            prune(make_model("qwen3"), rows, **arguments)
    with pytest.raises(MamaError, match="calibration"):
        prune(make_model("llama"), None, "wanda")
