"""`accelerate launch train/distill.py --config recipe.yaml`; the same as `mama distill --config recipe.yaml`."""

import sys

from mama_trl.cli import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))
