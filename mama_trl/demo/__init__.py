"""What the embedded default trains on: real text and a verifiable task that exist on every machine."""
