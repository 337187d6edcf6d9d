"""Base models: their configuration, and their weights and tokenizer on a device; what is wrong with them is named."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kblam_ray.errors import InputError


def read_base_config(base_model: str | Path | PretrainedConfig) -> PretrainedConfig:
    """The transformers configuration of a base model, by name or folder; one that is given is returned.

    Raises:
        InputError: there is none.
    """
    if isinstance(base_model, PretrainedConfig):
        return base_model
    try:
        return AutoConfig.from_pretrained(str(base_model))
    except (OSError, ValueError) as error:
        raise InputError(
            f"there is no base model to be had by that name: {first_line(error)}",
            where=str(base_model),
            help="give the folder of a transformers model or its name on the hub; a private one needs HF_TOKEN",
        ) from None


def load_base_model(
    base_model: str | Path, device: torch.device, dtype: torch.dtype | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base model for evaluation and its tokenizer, by name or folder.

    Args:
        dtype: None, or "auto", is what the configuration states.

    Raises:
        InputError: there is no such dtype; weights or tokenizer are not there, damaged, or not the configuration's.
    """
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"there is no dtype {dtype!r}", where="dtype", help="give float32, bfloat16 or float16")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(base_model))
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(base_model), dtype=dtype or "auto")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        # The library says which weights do not fit in its log alone.
        raise InputError(
            f"the base model cannot be loaded: {first_line(error)}",
            where=str(base_model),
            help="check that the folder or the hub's copy has a tokenizer and whole weights that fit its configuration",
        ) from None
    return nn.Module.to(model.eval(), device), tokenizer


def usable_device(device: torch.device | str | None) -> torch.device:
    """A device that is there; None is a CUDA device if there is one, else the CPU.

    Raises:
        InputError: there is no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"there is no such device: {first_line(error)}", where=str(device), help="give cpu, or leave it out"
        ) from None


def first_line(error: Exception) -> str:
    """What an error of another library says, in one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)
