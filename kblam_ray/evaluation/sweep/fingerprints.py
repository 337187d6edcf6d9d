"""What a base model and an adapter are, by their content: the same digest for the same files, wherever they lie."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from kblam_ray.attention.adapter.config import CONFIG_FILE, AdapterConfig
from kblam_ray.attention.adapter.loading import TENSORS_FILE, read_adapter
from kblam_ray.errors import StorageError
from kblam_ray.model.base_model import read_base_config

_BLOCK_BYTES = 1 << 22
_NO_PART_OF_A_MODEL = (".md", ".png", ".jpg", ".gitattributes")


@dataclass(frozen=True)
class Candidate:
    """An adapter to evaluate.

    Attributes:
        name: what it is called in the report.
        path: a folder, absolute, or a name on the hub.
        config: its settings.
        digest: of its files.
    """

    name: str
    path: str
    config: AdapterConfig
    digest: str

    @classmethod
    def read(cls, name: str, path: str) -> Candidate:
        """Look at an adapter, which has to be whole.

        Raises:
            AdapterError, StorageError: see `read_adapter`.
        """
        config, _, folder = read_adapter(path)
        digest = _files_digest([folder / CONFIG_FILE, folder / TENSORS_FILE])
        return cls(name, absolute(path), config, digest)

    def to_json(self) -> dict[str, Any]:
        """What a report says of it."""
        config = self.config
        return {
            "adapter": self.path,
            "kind": config.kind,
            "encoder": config.encoder.model_dump() if config.encoder else None,
            "kb_layers": list(config.layers),
            "num_layers": config.base_shape.num_layers,
            "kb_scale": config.kb_scale,
            "question_prior": config.question_prior,
            "refusal_threshold": config.refusal_threshold,
        }


@dataclass(frozen=True)
class Base:
    """The base model that all candidates are made for.

    Attributes:
        path: a folder, absolute, or a name on the hub.
        digest: of its files; of a model on the hub, of name and commit.
    """

    path: str
    config: PretrainedConfig
    digest: str

    @classmethod
    def read(cls, base_model: str) -> Base:
        """Look at a base model without loading it.

        Raises:
            InputError: there is none by that name.
            StorageError: its files cannot be read.
        """
        config = read_base_config(base_model)
        folder = Path(base_model)
        if folder.is_dir():
            files = [file for file in sorted(folder.iterdir()) if file.is_file() and _is_part(file)]
            return cls(absolute(base_model), config, _files_digest(files))
        commit = getattr(config, "_commit_hash", None)
        return cls(base_model, config, digest_of({"name": base_model, "commit": commit, "config": config.to_dict()}))


def digest_of(described: Any) -> str:
    """32 hexadecimal digits of anything JSON can hold; the order of mappings does not count."""
    text = json.dumps(described, sort_keys=True, ensure_ascii=False, default=str)
    return blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


def absolute(path: str) -> str:
    """A folder's absolute path, for workers in other directories; what is no folder is a name on the hub and stays."""
    return str(Path(path).absolute()) if Path(path).is_dir() else path


def _is_part(file: Path) -> bool:
    return not file.name.startswith(".") and file.suffix.lower() not in _NO_PART_OF_A_MODEL


def _files_digest(files: Iterable[Path]) -> str:
    digest = blake2b(digest_size=16)
    for file in files:
        try:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while block := stream.read(_BLOCK_BYTES):
                    digest.update(block)
        except OSError as error:
            raise StorageError(
                f"cannot read the file: {error.strerror}", where=str(file), help="check path and rights"
            ) from None
    return digest.hexdigest()
