"""GRPO that prunes by what the reward asks for."""
