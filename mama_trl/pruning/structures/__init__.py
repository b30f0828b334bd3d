"""Whole heads and neurons, removed so that the model is really smaller."""
