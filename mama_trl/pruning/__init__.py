"""Pruning a whole model, in one shot or as a mask update of a training run."""
