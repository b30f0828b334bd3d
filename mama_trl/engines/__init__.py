"""Who holds a parameter: the view of what each rank owns, under every engine."""
