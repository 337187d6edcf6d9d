"""A bundle: base model, adapter and the knowledge base's address in one folder that loads back in one call.

    bundle/
      knowledge_model.json   {"base_model": "./base", "adapter": "./adapter", "kb": {"uri": "...", "version": 3}, ...}
      adapter/               as the adapter's own folder
      base/                  the base model's files, or elsewhere: a path or a name on the hub

Relative paths in the file count from the bundle. Another `version` is an edit of that line; null follows the newest.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kblam_ray import storage
from kblam_ray.attention.adapter.config import CONFIG_FILE
from kblam_ray.attention.adapter.loading import CARD_FILE, TENSORS_FILE, check_tensors, read_adapter
from kblam_ray.errors import InputError
from kblam_ray.model.base_model import first_line, read_base_config
from kblam_ray.model.matching import require_encoder
from kblam_ray.table.knowledge_base import KnowledgeBase

BUNDLE_FILE = "knowledge_model.json"
FORMAT_VERSION = 1

WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json")
"""What transformers loads; some repositories hold the same weights under other names, too."""
OLD_WEIGHTS = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
"""Copied where there are no safetensors."""
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "README.md", "*/*.jinja")


class BundledKnowledge(BaseModel):
    """Which knowledge base a bundle is about."""

    model_config = ConfigDict(extra="forbid")

    uri: str = Field(min_length=1, description="the table: a path or s3://bucket/prefix")
    version: int | None = Field(None, ge=0, description="table version; null follows the newest")


class Bundle(BaseModel):
    """What `knowledge_model.json` says."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    format_version: int = Field(FORMAT_VERSION, description="of this file")
    base_model: str = Field(min_length=1, description="folder, or name on the hub")
    adapter: str = Field(min_length=1, description="folder, or name on the hub")
    kb: BundledKnowledge | None = Field(None, description="the knowledge base, if the bundle names one")

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """The bundle in a folder, its relative paths resolved.

        Raises:
            InputError: no bundle there, a damaged one, or one of a newer format.
        """
        path = Path(folder) / BUNDLE_FILE
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
            version = given.get("format_version") if isinstance(given, dict) else None
            if isinstance(version, int) and version > FORMAT_VERSION:
                raise InputError(
                    f"the bundle has format {version}; this version of kblam-ray reads up to {FORMAT_VERSION}",
                    where=str(path),
                    help="upgrade kblam-ray",
                )
            bundle = cls.model_validate(given)
        except OSError as error:
            raise InputError(
                f"there is no bundle: {error.strerror}",
                where=str(path),
                help="give a folder written by jobs/bundle_model.py",
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(
                f"{'.'.join(map(str, first['loc']))}: {first['msg']}", where=str(path), help="correct the file"
            ) from None
        except ValueError as error:
            raise InputError(f"the file is not JSON: {error}", where=str(path), help="correct the file") from None
        bundle.base_model = _resolved(bundle.base_model, path.parent)
        bundle.adapter = _resolved(bundle.adapter, path.parent)
        if bundle.kb is not None and "://" not in bundle.kb.uri:
            bundle.kb.uri = str(path.parent / bundle.kb.uri)
        return bundle

    def write(self, folder: Path) -> None:
        """Write `knowledge_model.json` as it stands, one setting per line."""
        text = json.dumps(self.model_dump(), indent=2, ensure_ascii=False) + "\n"
        with (folder / BUNDLE_FILE).open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def is_bundle(path: str | Path) -> bool:
    """Whether a path is a folder with a bundle in it."""
    return (Path(path) / BUNDLE_FILE).is_file()


def write_bundle(
    output: str | Path,
    base_model: str | Path,
    adapter: str | Path,
    kb: str,
    version: int | None = None,
    *,
    copy_base: bool = True,
    follow: bool = False,
) -> Bundle:
    """Put base model, adapter and a knowledge base's address into a new folder. It appears whole or not at all.

    Args:
        output: the folder; none yet, or an empty one.
        base_model, adapter: folders, or names on the hub.
        kb: path or URI of the table, which stays where it is.
        version: the version to name; None is the newest.
        copy_base: copy the base model's files; otherwise the bundle refers to them.
        follow: name no version, so that the bundle always loads the newest.

    Returns:
        The bundle as `Bundle.read` gives it.

    Raises:
        InputError: the folder is not empty, there is no such base model, or it has no weights.
        AdapterError, AdapterMismatchError, EncoderMismatchError: the adapter is damaged, or does not fit the others.
        TableNotFoundError, TableError: there is no such table or version.
        StorageError: the disk or the store fails.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError("there is something already", where=str(output), help="give a new folder")
    config, tensors, adapter_folder = read_adapter(adapter)
    check_tensors(config, tensors, where=str(adapter_folder))
    config.check_base(read_base_config(base_model))
    table = KnowledgeBase.open(kb, version)
    require_encoder(config, table.encoder, where=table.uri)
    files = _base_files(base_model) if copy_base else []
    with storage.storage_errors(str(output)):
        output.parent.mkdir(parents=True, exist_ok=True)
        # A sibling, so that the last step is a rename.
        staging = output.parent / f".{output.name}.{secrets.token_hex(6)}.partial"
        staging.mkdir()
        try:
            (staging / "adapter").mkdir()
            for name in (CONFIG_FILE, TENSORS_FILE, CARD_FILE):
                if (adapter_folder / name).is_file():
                    _copy(adapter_folder / name, staging / "adapter" / name)
            for root, file in files:
                _copy(file, staging / "base" / file.relative_to(root))
            Bundle(
                base_model="./base" if copy_base else _reference(base_model),
                adapter="./adapter",
                kb=BundledKnowledge(uri=table.uri, version=None if follow else table.version),
            ).write(staging)
            staging.rename(output)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return Bundle.read(output)


def _base_files(base_model: str | Path) -> list[tuple[Path, Path]]:
    """Files of a base model that loading needs, each with the folder that its name counts from."""
    folder = Path(base_model)
    if not folder.is_dir():
        folder = _downloaded(str(base_model))
    weights = [file for pattern in WEIGHTS for file in folder.glob(pattern)]
    if not any(file.suffix == ".safetensors" for file in weights):
        weights = [file for pattern in OLD_WEIGHTS for file in folder.glob(pattern)]
    if not weights:
        raise InputError(
            "the base model has no weights to copy", where=str(base_model), help="give a folder with safetensors"
        )
    others = [file for pattern in SMALL_FILES for file in folder.glob(pattern) if not file.name.endswith(".index.json")]
    return [(folder, file) for file in sorted({*weights, *others}) if file.is_file()]


def _downloaded(name: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        try:
            names = HfApi().list_repo_files(name)
        except OSError:
            # No network: what was downloaded before will do.
            return Path(snapshot_download(name, local_files_only=True))
        has_safetensors = any(fnmatch(file, WEIGHTS[0]) for file in names)
        weights = WEIGHTS if has_safetensors else OLD_WEIGHTS
        return Path(
            snapshot_download(name, allow_patterns=[*weights, *SMALL_FILES], ignore_patterns=["*/*.safetensors"])
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise InputError(
            f"the base model cannot be downloaded: {first_line(error)}",
            where=name,
            help="check the name and the network, or bundle with --no-copy-base",
        ) from None


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def _reference(base_model: str | Path) -> str:
    path = Path(base_model)
    return str(path.resolve()) if path.exists() else str(base_model)


def _resolved(reference: str, folder: Path) -> str:
    """A path counted from the bundle; a name on the hub where there is no such path."""
    path = folder / reference
    is_path = reference.startswith(("./", "../", "/")) or path.exists()
    if is_path and not path.exists():
        raise InputError(
            f"the bundle refers to {reference}, which is not there",
            where=str(folder / BUNDLE_FILE),
            help="put it there, or correct the reference",
        )
    return str(path) if is_path else reference
