"""Finds the folder of a model: "nano", a folder, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import HfApi, get_safetensors_metadata, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,  # of httpx or httpx2, depending on the installed client
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from mlx_diffgemma import nano
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import expand_path
from mlx_diffgemma.safetensors import Stored, from_header, read_headers

SMALL = ["*.json", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*", "NOTICE*"]
WANTED = [*SMALL, "*.safetensors"]


def resolve(
    model: str, revision: str | None = None, before_weights: Callable[[Path], object] | None = None
) -> Path:
    """The folder of a model.

    A Hub repository is downloaded with a progress bar; an interrupted download is continued.

    Args:
        model: "nano", a folder, or an id on the Hub.
        revision: The branch, tag or commit on the Hub.
        before_weights: Called with the folder when only the small files are there.  It may refuse
            the model by an error, before gigabytes are fetched.

    Raises:
        UserError: There is no such folder or repository, or the Hub cannot be reached.
    """
    if folder := _local(model, revision):
        return folder
    if before_weights:
        before_weights(small_files(model, revision))
    with _told(model, revision):
        return Path(snapshot_download(model, revision=revision, allow_patterns=WANTED))


def small_files(model: str, revision: str | None = None) -> Path:
    """A folder with everything of a model except its weights.

    Raises:
        UserError: As ``resolve``.
    """
    if folder := _local(model, revision):
        return folder
    with _told(model, revision):
        return Path(snapshot_download(model, revision=revision, allow_patterns=SMALL))


def headers(model: str, revision: str | None = None) -> tuple[Path, dict[str, Stored]]:
    """The headers of a model; of a Hub repository only headers and small files are fetched.

    Returns:
        (folder, tensors); the tensors of a repository cannot be read.

    Raises:
        UserError: As ``resolve``.
    """
    if local := _local(model, revision):
        return local, read_headers(local)
    with contextlib.suppress(LocalEntryNotFoundError, UserError):
        # A complete download needs no network.
        snapshot = snapshot_download(
            model, revision=revision, allow_patterns=WANTED, local_files_only=True
        )
        return Path(snapshot), read_headers(Path(snapshot))
    folder = small_files(model, revision)
    with _told(model, revision):
        commit = folder.name
        files = get_safetensors_metadata(model, revision=commit).files_metadata
    stored: dict[str, Stored] = {}
    for file, metadata in files.items():
        header = {name: vars(info) for name, info in metadata.tensors.items()}
        stored.update(from_header(header, folder / file, 0))
    return folder, stored


def check_upload(repo: str) -> None:
    """Create ``repo`` unless it exists, to know before the work that it can be written.

    Raises:
        UserError: It cannot be written.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise UserError(f"{repo!r} is no Hub repository; give owner/name.") from None
    try:
        HfApi().whoami()
        HfApi().create_repo(repo, exist_ok=True)
    except LocalTokenNotFoundError:
        raise UserError(
            f"Nobody is logged in who could upload to {repo}; "
            "run `hf auth login` with a write token."
        ) from None
    except (HTTPError, OSError, RuntimeError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise UserError(
                f"The Hub does not let you write to {repo} (HTTP {status}); "
                "run `hf auth login` with a token that may."
            ) from None
        raise UserError(
            f"{repo} on the Hub could not be reached ({type(error).__name__}); check the network, "
            "or leave --upload-repo out."
        ) from None


def upload(folder: Path, repo: str) -> None:
    """Upload a folder into a repository that ``check_upload`` has made.

    Raises:
        UserError: The upload fails.
    """
    try:
        HfApi().upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Converted with mlx-diffgemma"
        )
    except (HTTPError, OSError, RuntimeError) as error:
        raise UserError(
            f"{folder} is complete, but uploading it to {repo} failed ({type(error).__name__}); "
            f"upload it with `hf upload {repo} {folder}`."
        ) from None


def _local(model: str, revision: str | None = None) -> Path | None:
    """The folder of a model on this machine; None for a name that can only be a Hub id.

    Raises:
        UserError: It is neither a checkpoint folder nor a Hub id.
    """
    path = nano.FOLDERS.get(model) or expand_path(model)
    if os.path.isdir(path):  # Path.is_dir raises on a name that is too long
        if revision is not None:
            raise UserError(
                f"--revision is for Hub ids, and {model} is a folder on this machine; leave it out."
            )
        if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
            raise UserError(
                f"{path} holds an adapter; give it as --adapter-path, "
                "and its base model as --model."
            )
        return path
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise UserError(
            f"There is no folder {model!r}; give a checkpoint folder, a Hub id like owner/name, "
            f"or {nano.NAME!r}."
        )
    return None


@contextlib.contextmanager
def _told(model: str, revision: str | None) -> Iterator[None]:
    """Turn the errors of the Hub's client into messages for the user.

    Raises:
        UserError: The client raised one of its errors.
    """
    try:
        yield
    except UserError:
        raise
    except GatedRepoError:
        raise UserError(
            f"{model} on the Hub asks you to accept its terms first: open its page, accept, "
            "then `hf auth login`."
        ) from None
    except NotASafetensorsRepoError:
        raise UserError(
            f"{model} on the Hub holds no safetensors file; only safetensors checkpoints are read."
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{model} on the Hub has no revision {revision!r}.") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"There is neither a folder nor a Hub repository {model!r}; check the spelling, or log "
            "in with `hf auth login` if it is private."
        ) from None
    # The xet transport raises RuntimeError.
    except (LocalEntryNotFoundError, HTTPError, OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
            raise UserError(
                f"{model} could not be stored ({error.strerror}); make room, "
                "or choose another place with HF_HOME."
            ) from None
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        raise UserError(
            f"{model} could not be fetched from {endpoint} ({type(error).__name__}); check the "
            "network and run the command again, it continues where it stopped, or give a local folder."
        ) from None
