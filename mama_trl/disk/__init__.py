"""What is read from and written to a disk, and what a machine refuses: folders, paths, locks, whole files."""
