"""Runs the command in a separate process."""

import sys

# What users install has no torch.  Where the tests have it, transformers would import it at every
# start, which takes longer than the rest of the start.
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; "
COMMAND = [sys.executable, "-c", WITHOUT_TORCH + "from mlx_diffgemma.cli import main; main()"]
