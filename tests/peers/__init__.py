"""Our trainers against those they stand in for: without masks the same, with masks exact zeros, every option."""
