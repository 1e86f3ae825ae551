"""The command line: :mod:`mlx_diffgemma.cli.app` lists the commands, one module holds each."""

from mlx_diffgemma.failures import quiet_until_main

quiet_until_main()  # the imports that follow, and those of the command, can take seconds

# isort: split
from mlx_diffgemma.cli.app import main

__all__ = ["main"]
