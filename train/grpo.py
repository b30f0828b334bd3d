"""`accelerate launch train/grpo.py --config recipe.yaml` is `mama grpo --config recipe.yaml` under accelerate."""

import sys

from mama_trl.cli import main

if __name__ == "__main__":
    sys.exit(main(["grpo", *sys.argv[1:]]))
