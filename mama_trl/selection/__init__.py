"""Which connections are kept, given their scores."""
