"""`accelerate launch train/grpo.py --config recipe.yaml`; the same as `mama grpo --config recipe.yaml`."""

import sys

from mama_trl.cli import main

if __name__ == "__main__":
    sys.exit(main(["grpo", *sys.argv[1:]]))
