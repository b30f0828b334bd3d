"""Measuring a saved model: perplexity, tasks, size."""
