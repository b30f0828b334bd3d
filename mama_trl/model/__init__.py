"""What is in a transformer: prunable matrices, decoder blocks, experts."""
