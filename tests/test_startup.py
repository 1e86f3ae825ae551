"""What a start imports: commands and public names are imported when they are used."""

import subprocess
import sys

import pytest

import mlx_diffgemma
from mlx_diffgemma.cli.app import COMMANDS, load_command

SLOW = {"mlx_lm", "transformers", "torch", "fastapi", "mlx_diffgemma.model.diffusion_gemma"}


def imported_by(code: str) -> set[str]:
    """The names of the modules that a fresh interpreter has after ``code``."""
    listed = "print(*sys.modules, file=sys.stderr)"  # apart from what the code prints
    code = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\n{listed}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "code",
    [
        "import mlx_diffgemma",
        "from mlx_diffgemma.cli import main; main(['--version'])",
        "from mlx_diffgemma.cli import main; main(['--help'])",
    ],
)
def test_a_start_imports_neither_the_model_nor_transformers(code):
    assert imported_by(code) & SLOW == set()


def test_every_public_name_is_found():
    assert set(mlx_diffgemma.__all__) == mlx_diffgemma._DEFINED_IN.keys()
    for name in mlx_diffgemma.__all__:
        found = getattr(mlx_diffgemma, name)
        assert found.__module__ == mlx_diffgemma._DEFINED_IN[name]
    assert set(mlx_diffgemma.__all__) <= set(dir(mlx_diffgemma))
    with pytest.raises(AttributeError, match="no attribute 'none_such'"):
        mlx_diffgemma.none_such  # noqa: B018


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_each_says_of_itself(name):
    said = (load_command(name).help or "").split("\n\n")[0]
    assert " ".join(said.split()) == COMMANDS[name].help
