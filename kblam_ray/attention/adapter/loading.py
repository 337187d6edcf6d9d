"""Read an adapter's folder, local or from the Hugging Face hub, and say plainly what is wrong with it.

Only safetensors are read: a pickle can run any code that its author put into it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kblam_ray.attention.adapter import hub
from kblam_ray.attention.adapter.config import CONFIG_FILE, AdapterConfig
from kblam_ray.errors import AdapterError, StorageError

TENSORS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def read_adapter(
    path: str | Path, *, revision: str | None = None
) -> tuple[AdapterConfig, dict[str, torch.Tensor], Path]:
    """Settings and tensors of an adapter, on the CPU, and the folder they were read from.

    The tensors are what the file holds; `check_tensors` compares them with the settings.

    Args:
        path: a folder, or `owner/name` on the hub where there is no such folder.
        revision: branch, tag or commit on the hub.

    Raises:
        AdapterError: no folder and no name; no adapter in it, a damaged one, or one that is stored as a pickle.
        StorageError: the files cannot be read or the hub cannot be reached.
    """
    folder = Path(path)
    if folder.is_file():
        raise AdapterError(
            "an adapter is a folder, this is a file",
            where=str(path),
            help="give the folder; a checkpoint of the published KBLaM code is read by `KnowledgeAdapter.from_kblam`",
        )
    if not folder.is_dir():
        if not _HUB_NAME.fullmatch(str(path)):
            raise AdapterError(
                "there is no such folder", where=str(path), help="check the path, or give `owner/name` on the hub"
            )
        folder = hub.download(str(path), revision, [CONFIG_FILE, TENSORS_FILE, CARD_FILE])
    config = AdapterConfig.read(folder)
    return config, _read_tensors(folder), folder


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / TENSORS_FILE
    if not path.is_file():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise AdapterError(
                f"the folder has {pickles[0]} where {TENSORS_FILE} belongs: a pickle, which could run any code "
                "when loaded, so it is not",
                where=str(folder),
                help="ask its author for safetensors; checkpoints of the published KBLaM code go through `from_kblam`",
            )
        raise AdapterError(f"the folder has no {TENSORS_FILE}", where=str(folder), help="get the whole adapter again")
    refuse_pickle(path)
    return read_safetensors(path)


def refuse_pickle(path: Path) -> None:
    """Make sure that a file called safetensors is no pickle under another name.

    Raises:
        AdapterError: it is a pickle or a torch archive.
        StorageError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise StorageError(f"cannot read the file: {error.strerror}", where=str(path), help="check the disk") from None
    # A safetensors file starts with the 8-byte length of its header and a brace; torch archives are zip files,
    # pickles of protocol 2 and above start with 0x80 and the protocol.
    if start[8:9] != b"{" and (
        start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05")
    ):
        raise AdapterError(
            "the file is a pickle under the name of safetensors; a pickle could run any code when loaded, so it is not",
            where=str(path),
            help="ask its author for safetensors",
        )


def read_safetensors(path: Path, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file on the CPU, all of them or those named.

    Raises:
        AdapterError: the file is damaged.
        StorageError: it cannot be read.
    """
    with opened_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}


@contextmanager
def opened_safetensors(path: Path) -> Iterator[safe_open]:
    """A safetensors file whose damage is an AdapterError that names it."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise AdapterError(
            f"the file is damaged or no safetensors file ({error})", where=str(path), help="get the file again"
        ) from None
    except OSError as error:
        raise StorageError(f"cannot read the file: {error}", where=str(path), help="check path and rights") from None


ONE_ADAPTER = f"{CONFIG_FILE} and the tensors must be of one adapter: get both again"


def check_tensors(
    config: AdapterConfig, tensors: Mapping[str, torch.Tensor], *, where: str | None, help: str = ONE_ADAPTER
) -> None:
    """Make sure that tensors are those of an adapter with these settings, and numbers to compute with.

    Args:
        help: what to do about tensors that do not fit the settings.

    Raises:
        AdapterError: one is missing, superfluous, of another shape, no floating-point one, not loaded, not finite, or
            a scale that is not positive.
    """
    shapes = config.tensor_shapes()
    for problem, names in (("lacks", shapes.keys() - tensors.keys()), ("has also", tensors.keys() - shapes.keys())):
        if names:
            raise AdapterError(
                f"the adapter {problem} the tensors {_listed(names)}",
                where=where,
                help=help,
            )
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise AdapterError(
                f"tensor {name} has the shape {list(tensor.shape)}, the settings make it {list(shapes[name])}",
                where=where,
                help=help,
            )
        if tensor.is_meta:
            raise AdapterError(
                f"tensor {name} is not loaded: it is on the meta device",
                where=where,
                help="give tensors with numbers in them; a model offloaded to the disk has none for some",
            )
        check_dtype(tensor.dtype, where=f"tensor {name}" + (f", {where}" if where else ""))
        check_numbers(name, tensor, where=where)


def check_dtype(dtype: Any, *, where: str) -> None:
    """Raises AdapterError unless an adapter's tensors can be of `dtype`."""
    if dtype not in DTYPES:
        raise AdapterError(
            f"an adapter cannot be {str(dtype).removeprefix('torch.')}",
            where=where,
            help="adapters are torch.float16, bfloat16, float32 or float64",
        )


def check_numbers(name: str, tensor: torch.Tensor, *, where: str | None) -> None:
    """Raises AdapterError unless a tensor of an adapter is finite in its dtype, and a scale above 0."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if not torch.isfinite(tensor).all():
        raise AdapterError(
            f"tensor {name} holds numbers that are not finite in {dtype}",
            where=where,
            help="the training diverged, the file is damaged or the dtype too narrow: use an earlier checkpoint, or "
            "a wider dtype",
        )
    if name == "key_scale" and not (tensor > 0).all():
        raise AdapterError(
            f"key_scale is {tensor.item():g} in {dtype}; scores are divided by it",
            where=where,
            help="it is the spread of the encoder's key embeddings, above 0",
        )


def common_dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """The smallest dtype that holds the numbers of all tensors without loss."""
    found, *others = {tensor.dtype for tensor in tensors}
    for dtype in others:
        found = torch.promote_types(found, dtype)
    return found


def _listed(names: Iterable[str]) -> str:
    first, *rest = sorted(names)
    shown = [first, *rest[:2]]
    return ", ".join(shown) + (f" and {len(rest) - 2} more" if len(rest) > 2 else "")
