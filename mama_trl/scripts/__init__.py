"""One file for each command of `mama`; also what `accelerate launch` starts."""
