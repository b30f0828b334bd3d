"""Our trainers against those they stand in for: every option of the parent, without masks the same, with masks exact."""
