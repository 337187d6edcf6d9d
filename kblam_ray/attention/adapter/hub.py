"""Adapters on the Hugging Face hub: download, upload, and what each refusal of the hub means."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kblam_ray.errors import AdapterError, StorageError

HUB_TIMEOUT_S = 10.0


def download(name: str, revision: str | None, files: list[str]) -> Path:
    """The local folder of a repository's `files`; the copy in the cache where the hub cannot be reached.

    Args:
        revision: branch, tag or commit; None is the newest.

    Raises:
        AdapterError: the hub has no such repository or revision, or does not show it to us.
        StorageError: the hub cannot be reached and the cache has no copy.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    with _explained(name, "there is no such folder on this machine, and "):
        try:
            # One quick question first: a download retries an unreachable hub for more than a minute.
            HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_S)
            return Path(snapshot_download(name, revision=revision, allow_patterns=files))
        except (HTTPError, OSError) as error:
            if isinstance(error, HfHubHTTPError) and _refused(error):
                raise
            try:
                return Path(snapshot_download(name, revision=revision, allow_patterns=files, local_files_only=True))
            except LocalEntryNotFoundError:
                raise error from None


def upload(
    folder: Path,
    name: str,
    *,
    compared: list[str],
    keep: Callable[[Path], list[str]],
    private: bool | None,
    commit_message: str,
    revision: str | None,
    token: str | None,
) -> str:
    """Upload a folder into a repository, made where there is none.

    Args:
        compared: files to fetch first, where the repository has them.
        keep: given the folder of those, names the files that must stay as they are in the repository.
        private: of a new repository; None is the account's default.

    Returns:
        The address of the commit.

    Raises:
        AdapterError: the hub refuses the name or the credentials.
        StorageError: the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    hub = HfApi(token=token)
    with _explained(name):
        name = hub.create_repo(name, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as there:
            for file in compared:
                if hub.file_exists(name, file, revision=revision):
                    hub.hf_hub_download(name, file, revision=revision, local_dir=there)
            kept = keep(Path(there))
        done = hub.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            ignore_patterns=kept,
        )
    return done.commit_url


@contextmanager
def _explained(name: str, besides: str = "") -> Iterator[None]:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except HFValidationError:
        raise AdapterError("not a name the hub can have", where=name, help="give `owner/name`") from None
    except OfflineModeIsEnabled:
        raise StorageError(
            f"{besides}HF_HUB_OFFLINE forbids the hub", where=name, help="unset HF_HUB_OFFLINE, or use a folder"
        ) from None
    except GatedRepoError:
        raise AdapterError("access is gated", where=name, help="accept the terms on the hub and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise AdapterError(
            f"{besides}the hub has no such repository, or a private one",
            where=name,
            help="check the path or name; for a private repository set HF_TOKEN",
        ) from None
    except RevisionNotFoundError:
        raise AdapterError(
            "the repository has no such revision", where=name, help="give a branch, tag or commit of it"
        ) from None
    except (HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, HfHubHTTPError) and _refused(error):
            raise AdapterError(f"the hub refused: {reason}", where=name, help="check name and HF_TOKEN") from None
        raise StorageError(
            f"{besides}the hub cannot be reached ({reason})",
            where=name,
            help="check path and network",
        ) from None


def _refused(error: Exception) -> bool:
    """Whether the hub answered and meant it, so that asking again or elsewhere is of no use."""
    response = getattr(error, "response", None)
    return response is not None and 400 <= response.status_code < 500 and response.status_code not in (408, 429)
