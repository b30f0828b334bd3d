"""What a mask is: packed bits, sets of masks, and their files."""
