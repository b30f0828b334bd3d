"""`accelerate launch train/sft.py --config recipe.yaml`; the same as `mama sft --config recipe.yaml`."""

import sys

from mama_trl.cli import main

if __name__ == "__main__":
    sys.exit(main(["sft", *sys.argv[1:]]))
