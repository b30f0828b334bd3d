"""`accelerate launch train/pretrain.py --config recipe.yaml`; the same as `mama pretrain --config recipe.yaml`."""

import sys

from mama_trl.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
