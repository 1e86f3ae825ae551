"""``python -m mlx_diffgemma`` is the command ``mlx-diffgemma``."""

from mlx_diffgemma.cli import main

if __name__ == "__main__":
    main()
