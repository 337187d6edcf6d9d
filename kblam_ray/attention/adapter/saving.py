"""Write an adapter's folder: settings, tensors, model card; and push it to the Hugging Face hub."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from kblam_ray.attention.adapter import hub
from kblam_ray.attention.adapter.config import CONFIG_FILE, AdapterConfig
from kblam_ray.attention.adapter.loading import CARD_FILE, TENSORS_FILE, check_tensors
from kblam_ray.errors import AdapterError, StorageError


def write_adapter(path: str | Path, config: AdapterConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the three files of an adapter into a folder.

    A new folder appears with everything in it or not at all. In one that exists each file is replaced in one step,
    the tensors first; a model card that someone has written or edited is kept, and so is everything else.

    Raises:
        AdapterError: the path is a file, or the tensors are not those of the settings, or not finite.
        StorageError: the disk cannot be written.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise AdapterError("a file is where the adapter's folder should be", where=str(path), help="give another path")
    check_tensors(config, tensors, where=None)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # On the same disk as what it becomes, so that a rename is one step; a folder that exists may be a mount, or a
        # link to another disk.
        is_new = not folder.is_dir()
        staging = (folder.parent if is_new else folder) / f".{folder.name}.{secrets.token_hex(6)}.partial"
        staging.mkdir()
        try:
            _fill(staging, config, tensors)
            if not is_new or not _became(staging, folder):
                _replace_files(staging, folder)
            sync(folder)
            if is_new:
                sync(folder.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise StorageError(
            f"the adapter cannot be written: {reason}", where=str(path), help="check the disk's space and rights"
        ) from None


def push_adapter(
    repo_id: str,
    config: AdapterConfig,
    tensors: Mapping[str, torch.Tensor],
    private: bool | None,
    commit_message: str,
    *,
    revision: str | None,
    token: str | None,
) -> str:
    """Upload what `write_adapter` writes; the address of the commit.

    Raises:
        AdapterError: the hub refuses the name or the credentials, or the tensors are not finite.
        StorageError: the hub cannot be reached, or the temporary folder not written.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "adapter"
        write_adapter(folder, config, tensors)
        return hub.upload(
            folder,
            repo_id,
            compared=[CONFIG_FILE, CARD_FILE],
            keep=_files_to_keep,
            private=private,
            commit_message=commit_message,
            revision=revision,
            token=token,
        )


def model_card(config: AdapterConfig) -> str:
    """The README.md of an adapter: its facts in Markdown, with the header that the hub reads."""
    shape, encoder = config.base_shape, config.encoder
    layers = ", ".join(map(str, config.layers))
    shift = "none" if config.kb_scale is None else f"log {config.kb_scale:g} - log M"
    facts = "not recorded" if config.training_kb_range is None else "{} to {}".format(*config.training_kb_range)
    rows = {
        "Kind": config.kind,
        "Base model": f"{config.base_model or 'not recorded'} ({shape.model_type}: {shape.num_layers} layers, "
        f"hidden {shape.hidden_size}, {shape.num_heads} heads of {shape.head_dim})",
        "Sentence encoder": f"{encoder.name}, revision {encoder.revision}" if encoder else "not recorded",
        "Numbers per base embedding": config.dim,
        "KB layers": f"{layers} ({config.slots} slots)",
        "Retrieval layers": ", ".join(map(str, config.retrieval_layers)),
        "Shift of the KB logits": shift,
        "Question prior": f"beta {config.question_prior:g}, gamma {config.prior_lexical:g}, {config.prior_context}",
        "Refusal": f"`{config.refusal_text}`"
        + ("" if config.refusal_threshold is None else f" below {config.refusal_threshold:g}"),
        "Facts per example in training": facts,
    }
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())
    # The hub refuses a card whose base model is a path.
    is_hub_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", config.base_model or "")
    base = f"base_model: {config.base_model}\n" if is_hub_name else ""
    return f"""---
library_name: kblam-ray
{base}tags:
- knowledge-adapter
---

# Knowledge adapter

Lets the frozen base model below attend to the facts of a knowledge base, as key/value pairs that are not in its prompt
(rectangular attention, [KBLaM, arXiv 2410.10450](https://arxiv.org/abs/2410.10450)).

| | |
|---|---|
{table}

```python
from kblam_ray import KnowledgeAdapter

adapter = KnowledgeAdapter.from_pretrained("path/or/name")
```

The settings are in `{CONFIG_FILE}`, the tensors in `{TENSORS_FILE}`. No licence is stated: whoever publishes this
adapter chooses one that the base model, the encoder and the training data allow.
"""


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _files_to_keep(folder: Path) -> list[str]:
    """The model card of a folder, unless it is, word for word, the one that the folder's settings give."""
    card = folder / CARD_FILE
    if not card.exists():
        return []
    try:
        is_generated = card.read_text(encoding="utf-8") == model_card(AdapterConfig.read(folder))
    except (AdapterError, UnicodeDecodeError):
        is_generated = False
    return [] if is_generated else [CARD_FILE]


def _fill(folder: Path, config: AdapterConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    # Contiguous copies: safetensors refuses views and tensors that share memory.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    save_file(plain, folder / TENSORS_FILE, metadata={"format": "pt"})
    config.write(folder)
    # safetensors makes the file readable for its owner alone.
    (folder / TENSORS_FILE).chmod((folder / CONFIG_FILE).stat().st_mode)
    (folder / CARD_FILE).write_text(model_card(config), encoding="utf-8")
    for file in folder.iterdir():
        sync(file)


def _became(staging: Path, folder: Path) -> bool:
    """Make the staging folder the folder; False where someone else has made that one meanwhile."""
    try:
        staging.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        return False
    return True


def _replace_files(staging: Path, folder: Path) -> None:
    kept = _files_to_keep(folder)
    for name in (TENSORS_FILE, CONFIG_FILE, CARD_FILE):
        if name not in kept:
            os.replace(staging / name, folder / name)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
