"""Attach adapters to a Hugging Face decoder: its KB layers attend to facts, and no model file is copied.

transformers looks up one attention function per layer, by the name in the attention module's config. The KB layers get
a copy of that config with our name in it, so that they, and no others, call `site.knowledge_attention`; a forward
pre-hook hands it the hidden states that the layer received. What a token attends to travels down as the keyword
argument `knowledge`, which model families pass to their layers. Without knowledge the library's own function is called
with its own arguments: the output is the base model's to the bit.
"""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from kblam_ray.attention.adapter import BaseShape, KnowledgeAdapter
from kblam_ray.attention.batch import ForwardPass, Knowledge, Recorder, Segment, segments_of_rows
from kblam_ray.attention.decoder import attention_modules, decoder_layer_of, mixes_tokens_later, refuse_unsupported
from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.attention.site import Site
from kblam_ray.errors import AdapterMismatchError, InputError, UnsupportedModelError


class PackedBatches(Protocol):
    """Says what the sequences of a packed batch attend to; continuous batching registers one."""

    def segments(self, inputs: dict[str, Any]) -> list[Segment] | None:
        """Segments of the packed batch that `inputs` are the arguments of; None if it is not one of this engine's."""


class Attachment:
    """One adapter attached to one base model; see `attach`."""

    def __init__(self, host: _Host, adapter: KnowledgeAdapter) -> None:
        self._host: _Host | None = host
        self._num_engines = 0
        self.adapter = adapter

    @property
    def base_model(self) -> PreTrainedModel:
        return self._attached_host().model

    @contextmanager
    def using(self, knowledge: Knowledge, recorder: Recorder | None = None) -> Iterator[None]:
        """Every forward pass of the base model in this thread attends to `knowledge`, for `generate()` and the like."""
        token = _IN_USE.set((*_IN_USE.get(), _InUse(self._attached_host(), knowledge, recorder)))
        try:
            yield
        finally:
            _IN_USE.reset(token)

    def check(self, memory: KnowledgeMemory | None) -> None:
        """Raises AdapterMismatchError for a memory of an adapter that is not attached to the base model."""
        self._attached_host().check_memory(memory)

    @contextmanager
    def packed(self, batches: PackedBatches) -> Iterator[None]:
        """Ask `batches` what the sequences of a packed batch attend to, in every thread."""
        host = self._attached_host()
        with _LOCK:
            # Never changed in place: other threads are reading it.
            host.engines = (*host.engines, batches)
            self._num_engines += 1
        try:
            yield
        finally:
            with _LOCK:
                self._num_engines -= 1
                host.engines = tuple(engine for engine in host.engines if engine is not batches)

    def detach(self) -> None:
        """Take the adapter off; after the last one the base model is as it was. Detaching twice does nothing.

        Raises:
            InputError: an engine answers requests with it.
        """
        with _LOCK:
            if self._num_engines:
                raise InputError(
                    "an engine answers requests with the adapter", where="detach", help="stop the engine first"
                )
            if self._host is not None:
                self._host.remove(self.adapter)
                self._host = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        """A copy of the adapter, attached to a copy of the base model."""
        copied = Attachment.__new__(Attachment)
        copied.adapter, copied._host = copy.deepcopy(self.adapter, memo), None
        copied._num_engines = 0
        if self._host is not None:
            copied._host = attach(copy.deepcopy(self.base_model, memo), copied.adapter)._host
        return copied

    def _attached_host(self) -> _Host:
        if self._host is None:
            raise AdapterMismatchError("the adapter was detached", where="base model", help="attach it again")
        return self._host


def attach(base_model: PreTrainedModel, adapter: KnowledgeAdapter) -> Attachment:
    """Let the KB layers of `base_model` attend to memories of `adapter`.

    Several adapters, and the same one several times, may be attached to one base model.

    Args:
        base_model: a decoder of transformers with a language-model head, attention implementation "sdpa" or "eager".
        adapter: made for a model of this shape.

    Raises:
        AdapterMismatchError: the adapter was made for another shape of model.
        InputError: it is no model of transformers, or no adapter.
        UnsupportedModelError: the attention has something that cannot be merged with, or no interface to attach to.
    """
    for given, wanted in ((base_model, PreTrainedModel), (adapter, KnowledgeAdapter)):
        if not isinstance(given, wanted):
            # A wrapper would be attached to in vain: its `generate` calls the model inside.
            raise InputError(
                f"a {type(given).__name__} is no {wanted.__name__}",
                where="attach",
                help="attach a KnowledgeAdapter to a model of transformers itself; a wrapper, such as torch.compile"
                " makes, may then be called with knowledge, too",
            )
    adapter.config.check_base(base_model.config)
    with _LOCK:
        host = _HOSTS.get(base_model)
        if host is None:
            host = _Host(base_model)
        host.add(adapter)
        _HOSTS[base_model] = host
        return Attachment(host, adapter)


@dataclass(frozen=True)
class _InUse:
    host: _Host
    knowledge: Knowledge
    recorder: Recorder | None


_IN_USE: ContextVar[tuple[_InUse, ...]] = ContextVar("kblam_ray_in_use", default=())


class _Host:
    """A base model with adapters attached."""

    def __init__(self, base_model: PreTrainedModel) -> None:
        self._model = weakref.ref(base_model)
        self._modules = attention_modules(base_model)
        self._last = _last_layer(base_model, self._modules)
        self._adapters: dict[KnowledgeAdapter, int] = {}
        self._sites: dict[int, Site] = {}
        self._hooks: list[Any] = []
        self.engines: tuple[PackedBatches, ...] = ()

    @property
    def model(self) -> PreTrainedModel:
        model = self._model()
        if model is None:
            raise AdapterMismatchError("the base model is gone", where="attachment", help="keep a reference to it")
        return model

    def add(self, adapter: KnowledgeAdapter) -> None:
        for layer in adapter.config.layers:
            if layer not in self._modules:
                raise UnsupportedModelError(
                    f"layer {layer} has no attention to attach to",
                    where=type(self.model).__name__,
                    help=f"choose KB layers among {sorted(self._modules)}",
                )
        refuse_unsupported(self.model, [self._modules[layer] for layer in adapter.config.layers])
        if not self._hooks:
            self._hooks = [
                self.model.register_forward_pre_hook(self._before_model, with_kwargs=True),
                self.model.register_forward_hook(self._after_model, with_kwargs=True),
            ]
        self._adapters[adapter] = self._adapters.get(adapter, 0) + 1
        for layer in adapter.config.layers:
            if layer not in self._sites:
                module = self._modules[layer]
                self._sites[layer] = Site(module, decoder_layer_of(self.model, module), layer)

    def remove(self, adapter: KnowledgeAdapter) -> None:
        self._adapters[adapter] -= 1
        if not self._adapters[adapter]:
            del self._adapters[adapter]
        used = {layer for other in self._adapters for layer in other.config.layers}
        for layer in set(self._sites) - used:
            self._sites.pop(layer).remove()
        if not self._adapters:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            if (model := self._model()) is not None:
                _HOSTS.pop(model, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Host:
        """For a copy of the base model: it has our hooks and no adapter attached, so that it is a plain base model."""
        copied = memo[id(self)] = _Host.__new__(_Host)
        copied._model = weakref.ref(copy.deepcopy(self.model, memo))
        copied._modules, copied._sites = copy.deepcopy(self._modules, memo), copy.deepcopy(self._sites, memo)
        copied._hooks = copy.deepcopy(self._hooks, memo)
        copied._last = self._last
        copied._adapters, copied.engines = {}, ()
        _HOSTS[copied.model] = copied
        return copied

    @torch.compiler.disable
    def _before_model(
        self, model: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        recorder = None
        knowledge = kwargs.pop("knowledge", None)
        if knowledge is None:
            in_use = next((use for use in reversed(_IN_USE.get()) if use.host is self), None)
            if in_use is not None:
                knowledge, recorder = in_use.knowledge, in_use.recorder
        segments = next((found for engine in self.engines if (found := engine.segments(kwargs)) is not None), None)
        if segments is None:
            if knowledge is None:
                return args, kwargs
            segments = segments_of_rows(knowledge, *_input_shape(args, kwargs))
        elif kwargs.get("attention_mask") is not None:
            # The engine's masks say it already. The library would write it into the model's config for the time of the
            # pass, where a pass in another thread reads it: that one would see tokens that come later.
            kwargs.pop("is_causal", None)
        for segment in segments:
            self.check_memory(segment.memory)
        wanted = None if recorder is not None else self._last_tokens(args, kwargs)
        like = next(model.parameters())
        forward = ForwardPass(segments, like.device, recorder, wanted, self.model.dtype)
        if forward.groups:
            kwargs["knowledge"] = forward
        return args, kwargs

    def _last_tokens(self, args: tuple, kwargs: dict[str, Any]) -> tuple[int, torch.Tensor] | None:
        """The last layer and the tokens whose logits are asked for, where nothing else of that layer can be seen.

        The first step of `generate` wants the logits of one token: at the others, the last layer need not look at the
        facts. The layers below must, since later tokens attend to what they make.
        """
        keep = kwargs.get("logits_to_keep")
        batch, length = _input_shape(args, kwargs)
        if keep is None or self._last is None or length == 1 or torch.is_grad_enabled():
            return None
        everything = ("output_hidden_states", "output_attentions", "output_router_logits", "labels")
        asked = (kwargs[name] if kwargs.get(name) is not None else self._setting(name) for name in everything)
        if any(value is not None and value is not False for value in asked):
            return None
        numbers_BT = torch.arange(batch * length, device=self.model.device).view(batch, length)
        kept = _kept(numbers_BT, keep).unique()
        return None if len(kept) == batch * length else (self._last, kept)

    def _num_layers_now(self) -> int:
        # Assisted decoding by early exit runs the first layers only, for guesses that all the layers then judge.
        return self.model.config.get_text_config(decoder=True).num_hidden_layers

    def _setting(self, name: str) -> Any:
        return getattr(self.model.config, name, None)

    @torch.compiler.disable
    def _after_model(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        forward = kwargs.get("knowledge")
        if not isinstance(forward, ForwardPass):
            return
        forward.is_over = True
        missed = {layer for layer in forward.layers - forward.served if layer < self._num_layers_now()}
        if missed:
            raise UnsupportedModelError(
                f"the knowledge did not reach the attention of layers {sorted(missed)}",
                where=type(model).__name__,
                help="this model's layers do not pass keyword arguments on: knowledge cannot be attached to it",
            )

    def check_memory(self, memory: KnowledgeMemory | None) -> None:
        if memory is not None and memory.adapter not in self._adapters:
            raise AdapterMismatchError(
                "the memory was made for an adapter that is not attached to this model",
                where="knowledge",
                help="load the knowledge base with the adapter of this model",
            )


_HOSTS: weakref.WeakKeyDictionary[PreTrainedModel, _Host] = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()
"""Held while adapters are attached and detached; running the model takes no lock."""


def _last_layer(base_model: PreTrainedModel, modules: dict[int, Any]) -> int | None:
    """The last decoder layer, if its attention is the last place where one token sees another; else None."""
    if "logits_to_keep" not in inspect.signature(base_model.forward).parameters:
        return None
    last = BaseShape.of(base_model.config).num_layers - 1
    if last not in modules or mixes_tokens_later(decoder_layer_of(base_model, modules[last]), modules[last]):
        return None
    return last


def _kept(numbers_BT: torch.Tensor, keep: Any) -> torch.Tensor:
    """The tokens that `logits_to_keep` names, in each of the ways in which the library reads it."""
    if isinstance(keep, int):
        return numbers_BT[:, slice(-keep, None)]
    if isinstance(keep, torch.Tensor) and keep.dim() == 2:
        keep = keep.to(numbers_BT.device)
        return numbers_BT[keep] if keep.dtype == torch.bool else numbers_BT.take_along_dim(keep, 1)
    return numbers_BT[:, keep]


def _input_shape(args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
    """Batch size and number of tokens of a call of the base model."""
    ids = args[0] if args else kwargs.get("input_ids")
    ids = kwargs.get("inputs_embeds") if ids is None else ids
    if ids is None:
        raise UnsupportedModelError("a call without input_ids", where="base model", help="give input_ids")
    return ids.shape[0], ids.shape[1]
