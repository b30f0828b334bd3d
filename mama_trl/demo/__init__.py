"""The demo run: text, task and stages that need no network."""
