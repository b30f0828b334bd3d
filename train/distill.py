"""`accelerate launch train/distill.py --config recipe.yaml` is `mama distill --config recipe.yaml` under accelerate."""

import sys

from mama_trl.cli import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))
