"""Statistics of a layer's inputs and its goal, by hand."""

import pytest
import torch

from mama_trl.solvers.problem import Goal, Gram


def test_goal_of_inputs_by_hand():
    gram = Gram(torch.tensor([[4.0]]), torch.tensor([2.0]), 1)
    goal = Goal.of_inputs(torch.tensor([[3.0]]), torch.tensor([5.0]), torch.tensor([[6.0]]), torch.tensor([3.0]), gram)
    assert goal.cross.tolist() == [[3 * 6 + 5 * 2.0]] and goal.total.tolist() == [3 * 3 + 5.0]


def test_gram_counts_means_and_norms():
    gram = Gram.zeros(2, "cpu")
    gram.add(torch.tensor([[[3.0, 1.0], [4.0, 1.0]]]))
    assert gram.gram.tolist() == [[25.0, 7.0], [7.0, 2.0]] and gram.mean.tolist() == [3.5, 1.0]
    assert gram.norm.tolist() == pytest.approx([5.0, 2**0.5])
    assert torch.allclose(gram.centred, torch.tensor([[0.5, 0.0], [0.0, 0.0]]), atol=1e-5)
