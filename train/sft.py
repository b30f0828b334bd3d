"""`accelerate launch train/sft.py --config recipe.yaml` is `mama sft --config recipe.yaml` under accelerate."""

import sys

from mama_trl.cli import main

if __name__ == "__main__":
    sys.exit(main(["sft", *sys.argv[1:]]))
