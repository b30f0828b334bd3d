"""How one matrix is pruned: pure functions of tensors."""
