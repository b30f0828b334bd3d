"""A training run: the Trainer's events, what a run remembers, trainers."""
