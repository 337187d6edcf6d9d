"""The tensors of a foreign checkpoint, by name and read one by one: mappings, files, folders, sharded indices.

A checkpoint of an 8-billion-parameter model is 16 GB, of which an adapter needs 0.4: nothing is read before it is
asked for. A `.pt` or `.bin` is opened with `weights_only=True`, which builds tensors and runs no code.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kblam_ray.attention.adapter.loading import PICKLE_SUFFIXES, opened_safetensors, read_safetensors, refuse_pickle
from kblam_ray.errors import AdapterError, StorageError

Reader = Callable[[], torch.Tensor]

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")


def entries(state: Mapping[str, torch.Tensor] | str | Path, *, preferred: tuple[str, ...]) -> dict[str, Reader]:
    """Name -> a function that reads that tensor.

    Args:
        state: a mapping, or the path of a `.safetensors`, `.pt` or index file, or of a folder with one of them.
        preferred: names to look for in a folder first.

    Raises:
        AdapterError: nothing there, damaged, not a mapping of tensors, or a pickle of more than tensors.
        StorageError: it cannot be read.
    """
    if isinstance(state, Mapping):
        return _of_mapping(state, "the mapping given")
    if not isinstance(state, str | os.PathLike):
        raise AdapterError(
            f"a {type(state).__name__} is not a checkpoint", help="give a state dict, or the path of one"
        )
    path = Path(state)
    if path.is_dir():
        names = (*preferred, *INDEX_FILES, *WHOLE_FILES)
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise AdapterError(
                f"the folder has none of {', '.join(names)}", where=str(path), help="give a checkpoint's folder or file"
            )
        path = found[0]
    if not path.is_file():
        raise AdapterError("there is no such file or folder", where=str(path), help="check the path")
    if path.name.endswith(".index.json"):
        return _of_index(path)
    return _of_file(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        AdapterError: it is not one.
        StorageError: the file cannot be read.
    """
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise StorageError(f"cannot read the file: {error.strerror}", where=str(path), help="check the disk") from None
    except ValueError as error:
        raise AdapterError(f"the file is not JSON: {error}", where=str(path), help="get the file again") from None
    if not isinstance(found, dict):
        raise AdapterError("the file is not a JSON object", where=str(path), help="get the file again")
    return found


def _of_mapping(state: Mapping[Any, Any], where: str) -> dict[str, Reader]:
    # Other things beside tensors do no harm (a step counter, a module's extra state); without any tensor it is no
    # state dict, but may hold one.
    if state and not any(isinstance(found, torch.Tensor) for found in state.values()):
        _tensor(*next(iter(state.items())), where)
    return {name: partial(_tensor, name, found, where) for name, found in state.items() if isinstance(name, str)}


def _tensor(name: str, found: object, where: str) -> torch.Tensor:
    if not isinstance(found, torch.Tensor):
        raise AdapterError(
            f"{name!r} is {type(found).__name__}, not a tensor",
            where=where,
            help="give a state dict: names and tensors, nothing nested",
        )
    return found


def _of_file(path: Path) -> dict[str, Reader]:
    if path.suffix == ".safetensors":
        refuse_pickle(path)
        with opened_safetensors(path) as file:
            return {name: partial(_read_one, path, name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    if path.suffix in PICKLE_SUFFIXES:
        return _of_mapping(_load_archive(path), str(path))
    raise AdapterError("not a kind of file that holds tensors", where=str(path), help="give a .safetensors or a .pt")


def _read_one(path: Path, name: str) -> torch.Tensor:
    return read_safetensors(path, [name])[name]


def _load_archive(path: Path) -> Mapping[str, Any]:
    try:
        # An archive of torch 1.6 and above is a zip file, whose tensors can stay on the disk until they are used.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise AdapterError(
            f"the file is damaged or holds more than tensors, and what it holds is not run ({_line(error)})",
            where=str(path),
            help="save only the state dict, best as safetensors",
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise AdapterError(
            f"the file is damaged ({_line(error)})", where=str(path), help="get the file again"
        ) from None
    except OSError as error:
        raise StorageError(f"cannot read the file: {error}", where=str(path), help="check path and rights") from None
    if not isinstance(state, Mapping):
        raise AdapterError(
            f"the file holds a {type(state).__name__}, not a state dict", where=str(path), help="save the state dict"
        )
    return state


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _of_index(path: Path) -> dict[str, Reader]:
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict):
        raise AdapterError("the index has no weight_map", where=str(path), help="get the file again")
    opened: dict[str, dict[str, Reader]] = {}
    return {name: partial(_read_shard, path.parent, shard, name, opened) for name, shard in shards.items()}


def _read_shard(folder: Path, shard: str, name: str, opened: dict[str, dict[str, Reader]]) -> torch.Tensor:
    if not isinstance(shard, str) or Path(shard).name != shard:
        raise AdapterError(
            f"the index places {name} outside its folder ({shard!r})", where=str(folder), help="get the file again"
        )
    if shard not in opened:
        if not (folder / shard).is_file():
            raise AdapterError(
                f"the shard {shard}, which holds {name}, is missing", where=str(folder), help="get it too"
            )
        opened[shard] = _of_file(folder / shard)
    if name not in opened[shard]:
        raise AdapterError(
            f"the shard {shard} has no {name}, which the index places there",
            where=str(folder),
            help="index and shards must be of one checkpoint: get both again",
        )
    return opened[shard][name]()
