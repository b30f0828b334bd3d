import pytest
import torch

from mama_trl.calibration import Gram
from mama_trl.errors import MamaError
from mama_trl.evaluation import perplexity
from mama_trl.oneshot import METHODS, prune
from mama_trl.oneshot.mama import mama
from mama_trl.oneshot.sparsegpt import sparsegpt
from mama_trl.oneshot.wanda import wanda
from mama_trl.redistribution import bias_shift, layer_error, least_squares, mean
from mama_trl.targets import find_targets


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
    for solve in (mama, sparsegpt):
        new, mask = solve(weight, gram, 0.5)
        assert torch.isfinite(new).all() and int(mask.sum()) == weight.numel() // 2


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
    from mama_trl.calibration import blockwise, collect

    for architecture in ("llama", "gpt2", "opt", "qwen3"):
        model = make_model(architecture).eval()
        targets = find_targets(model)
        seen = {}
        blockwise(model, rows[:6], targets, lambda own, grams: seen.update(grams), batch_size=4)
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
    model = make_model("llama")
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
    ]:
        with pytest.raises(MamaError, match=word):
            prune(make_model("llama"), rows, **arguments)
    with pytest.raises(MamaError, match="calibration"):
        prune(make_model("llama"), None, "wanda")
