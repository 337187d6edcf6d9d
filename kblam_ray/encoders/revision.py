"""The revision of an encoder: a hash that is the same for every copy that yields the same vectors.

It covers what the vectors depend on (weights, tokenizer, pooling and the modules after it, the default
prompt) and nothing that differs between copies: file names and formats, floating-point storage type of
equal numbers, metadata, and settings that a save rewrites (the padding of the tokenizer).
"""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

REVISION_DIGITS = 32

# Settings that change what a transformer computes while its weights stay the same.
COMPUTE_FIELDS = (
    "model_type",
    "hidden_act",
    "hidden_activation",
    "num_attention_heads",
    "num_key_value_heads",
    "layer_norm_eps",
    "rms_norm_eps",
)


def revision_of(*parts: str) -> str:
    """32 hexadecimal digits over texts that name a recipe; for encoders without weights."""
    digest = blake2b(digest_size=REVISION_DIGITS // 2)
    for part in parts:
        data = part.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def revision_of_model(model: SentenceTransformer) -> str:
    """32 hexadecimal digits over the weights, the tokenizer and the modules of `model`."""
    parts = [_canonical({"prompt": default_prompt(model), "max_tokens": model.max_seq_length})]
    parts.append(_canonical(_tokenizer_state(model.tokenizer)))
    for index, module in enumerate(model):
        parts.append(_module_state(module, is_input=index == 0))
    return revision_of(*parts)


def default_prompt(model: SentenceTransformer) -> str:
    """The text that `model.encode` puts before every text."""
    return model.prompts.get(model.default_prompt_name) or "" if model.default_prompt_name else ""


def _module_state(module: Any, is_input: bool) -> str:
    inner = getattr(module, "auto_model", None) if is_input else None
    if inner is None:
        settings = module.get_config_dict() if hasattr(module, "get_config_dict") else {}
        return _canonical({"module": type(module).__name__, **settings, "tensors": _tensors(module)})
    settings = {name: getattr(inner.config, name, None) for name in COMPUTE_FIELDS}
    # The pooler of BERT's kind comes after the token embeddings that sentence models read. Copies saved without it
    # get a random one at load, so it must count only where it is read.
    skip = "" if "pooler" in str(module.modality_config) else "pooler."
    return _canonical({"module": "Transformer", **settings, "tensors": _tensors(inner, skip)})


def _tensors(module: Any, skip: str = "") -> dict[str, str]:
    """Name -> hash of shape and float32 bytes, of every stored tensor of a torch module."""
    import torch

    hashes = {}
    for name, tensor in module.state_dict().items():
        if skip and name.startswith(skip):
            continue
        value = tensor.detach().cpu()
        if value.is_floating_point():
            value = value.to(torch.float32)
        digest = blake2b(str(tuple(value.shape)).encode(), digest_size=16)
        digest.update(value.contiguous().numpy().data)
        hashes[name] = digest.hexdigest()
    return hashes


def _tokenizer_state(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # Set anew at every call by the libraries, and by some of them at every save.
        for name in ("truncation", "padding", "version"):
            state.pop(name, None)
        return {"state": state, "side": tokenizer.padding_side}
    if hasattr(tokenizer, "get_vocab"):
        return {"vocab": tokenizer.get_vocab(), "kind": type(tokenizer).__name__}
    return {"kind": type(tokenizer).__name__}


def _canonical(value: Any) -> str:
    """JSON text that does not depend on the order of keys, nor on fields that a newer library adds as null."""
    return json.dumps(_without_nulls(value), sort_keys=True, ensure_ascii=True, default=str)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_nulls(item) for item in value]
    return value
