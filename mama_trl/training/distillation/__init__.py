"""Distillation of a dense teacher into a pruned student."""
