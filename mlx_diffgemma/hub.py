"""From what the user calls a model to a folder: "nano", a folder, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,  # of httpx or httpx2, whichever the installed client speaks
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mlx_diffgemma import nano
from mlx_diffgemma.errors import UserError

WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md"]


def resolve(model: str, revision: str | None = None, before_weights: Callable[[Path], object] | None = None) -> Path:
    """The folder of ``model``; a Hub repository is downloaded with a progress bar, an interrupted download goes on.

    ``before_weights`` is called with the folder when only the small files are there, and may refuse the model by an
    error before gigabytes are fetched.  Errors: UserError when there is no such folder or repository, or no network to ask.
    """
    if model == nano.NAME:
        return nano.FOLDER
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    looks_local = path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1
    if looks_local:
        raise UserError(f"There is no folder {model!r}; give a checkpoint folder, a Hub id like owner/name, or {nano.NAME!r}.")
    try:
        if before_weights:
            before_weights(Path(snapshot_download(model, revision=revision, allow_patterns=["*.json"])))
        return Path(snapshot_download(model, revision=revision, allow_patterns=WANTED))
    except UserError:
        raise
    except GatedRepoError:
        raise UserError(f"{model} on the Hub asks you to accept its terms first: open its page, accept, then `hf auth login`."
                        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{model} on the Hub has no revision {revision!r}.") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"There is neither a folder nor a Hub repository {model!r}; check the spelling, or log in with "
                        "`hf auth login` if it is private.") from None
    except (LocalEntryNotFoundError, HTTPError, OSError, RuntimeError) as error:  # RuntimeError: the xet transport
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        raise UserError(f"{model} could not be fetched from {endpoint} ({type(error).__name__}); check the network and run "
                        "the command again, it goes on where it stopped, or give a local folder.") from None
