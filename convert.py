"""Converts and quantises a checkpoint: ``python convert.py …`` is ``mlx-diffgemma convert …``."""

import sys

from mlx_diffgemma.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
