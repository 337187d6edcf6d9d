"""Attach adapters to a Hugging Face decoder: its KB layers attend to facts, and no model file is copied.

Shape legend: B batch, T prompt tokens, N query heads, H head dim.

transformers looks up one attention function per layer, by the name in the attention module's config. The KB layers get
a copy of that config with our name in it, so that they, and no others, call `_knowledge_attention`; a forward pre-hook
hands it the hidden states that the layer received. What a token attends to travels down as the keyword argument
`knowledge`, which every model family passes through. Without knowledge the library's own function is called with its
own arguments: the output is the base model's to the bit.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.batch import ForwardPass, Knowledge, Recorder, Segment, segments_of_rows
from kblam_ray.attention.config import BaseShape
from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.attention.text import sdpa_with_log_sum_exp, text_log_sum_exp
from kblam_ray.errors import AdapterMismatchError, InputError, UnsupportedModelError

ATTENTION_NAME = "kblam_ray"
SUPPORTED = ("sdpa", "eager")
"""Attention implementations of a base model whose log-sum-exp can be had."""


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
        host.engines.append(batches)
        self._num_engines += 1
        try:
            yield
        finally:
            self._num_engines -= 1
            host.engines.remove(batches)

    def detach(self) -> None:
        """Take the adapter off; after the last one the base model is as it was. Detaching twice does nothing.

        Raises:
            InputError: an engine answers requests with it.
        """
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
        UnsupportedModelError: the attention has something that cannot be merged with, or no interface to attach to.
    """
    adapter.config.check_base(base_model.config)
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
        _refuse_unsupported(base_model, self._modules)
        self._adapters: dict[KnowledgeAdapter, int] = {}
        self._sites: dict[int, _Site] = {}
        self._hooks: list[Any] = []
        self.engines: list[PackedBatches] = []

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
        if not self._hooks:
            self._hooks = [
                self.model.register_forward_pre_hook(self._before_model, with_kwargs=True),
                self.model.register_forward_hook(self._after_model, with_kwargs=True),
            ]
        self._adapters[adapter] = self._adapters.get(adapter, 0) + 1
        for layer in adapter.config.layers:
            if layer not in self._sites:
                self._sites[layer] = _Site(self._modules[layer], layer)

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
        copied._adapters, copied.engines = {}, []
        _HOSTS[copied.model] = copied
        return copied

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
        forward = ForwardPass(segments, next(model.parameters()).device, recorder, wanted)
        if forward.groups:
            kwargs["knowledge"] = forward
        return args, kwargs

    def _last_tokens(self, args: tuple, kwargs: dict[str, Any]) -> tuple[int, torch.Tensor] | None:
        """The last layer and the tokens whose logits are asked for, where nothing else of that layer can be seen.

        The first step of `generate` wants the logits of one token: at the others, the last layer need not look at the
        facts. The layers below must, since later tokens attend to what they make.
        """
        keep = kwargs.get("logits_to_keep", 0)
        everything = ("output_hidden_states", "output_attentions", "output_router_logits", "labels")
        asked = (kwargs[name] if kwargs.get(name) is not None else self._setting(name) for name in everything)
        if torch.is_grad_enabled() or any(value is not None and value is not False for value in asked):
            return None
        last = BaseShape.of(self.model.config).num_layers - 1
        batch, length = _input_shape(args, kwargs)
        if isinstance(keep, int):
            if not 0 < keep < length:
                return None
            keep = torch.arange(length - keep, length, device=self.model.device)
        rows_B1 = torch.arange(batch, device=keep.device)[:, None] * length
        return last, torch.unique(rows_B1 + keep.long() % length)

    def _setting(self, name: str) -> Any:
        return getattr(self.model.config, name, None)

    def _after_model(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        forward = kwargs.get("knowledge")
        if isinstance(forward, ForwardPass) and (missed := forward.layers - forward.served):
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


class _Site:
    """A KB layer's attention module while it is attached to."""

    def __init__(self, module: Any, layer: int) -> None:
        self._module, self.layer = module, layer
        self._config = module.config
        # A copy, because the model's own config must go on saying which masks and caches it needs.
        marked = copy.copy(module.config)
        marked._attn_implementation_internal = ATTENTION_NAME
        module.config = marked
        module.knowledge_site = self
        self._hook = module.register_forward_pre_hook(self._before_attention, with_kwargs=True)

    def remove(self) -> None:
        self._hook.remove()
        self._module.config = self._config
        del self._module.knowledge_site

    @property
    def implementation(self) -> str:
        """The attention implementation that the model's masks and caches are made for at this moment."""
        return self._config._attn_implementation

    def text_function(self) -> Callable[..., tuple[torch.Tensor, Any]]:
        """The library's attention function for this module."""
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, _eager_function(self._module))

    def _before_attention(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        forward = kwargs.pop("knowledge", None)
        if forward is not None and not isinstance(forward, ForwardPass):
            raise InputError(
                "knowledge was given to a part of the base model",
                where=type(module).__name__,
                help="give it to the model that the adapter is attached to",
            )
        if forward is not None:
            kwargs["knowledge_call"] = (forward, args[0] if args else kwargs["hidden_states"])
        return args, kwargs


def _knowledge_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function of KB layers: the library's, merged with the attention over facts.

    Args: as transformers calls attention functions: query [B, N, T, H], key and value [B, K, S, H].

    Returns:
        Output [B, T, N, H], and the text's attention weights where the library gives them.
    """
    site: Any = module.knowledge_site
    call = kwargs.pop("knowledge_call", None)
    function = site.text_function()
    if call is None:
        return function(module, query, key, value, attention_mask, **kwargs)
    forward, hidden_BTX = call
    attended = forward.attend(site.layer, hidden_BTX.flatten(0, 1))
    if attended is None:
        return function(module, query, key, value, attention_mask, **kwargs)
    _refuse_other_terms(site.implementation, type(module).__name__, kwargs)
    if site.implementation == "sdpa":
        text_BTNH, lse_BNT = sdpa_with_log_sum_exp(function, module, query, key, value, attention_mask, **kwargs)
        weights_BNTS = None
    elif site.implementation == "eager":
        text_BTNH, weights_BNTS = function(module, query, key, value, attention_mask, **kwargs)
        lse_BNT = text_log_sum_exp(query, key, attention_mask, scale=kwargs.get("scaling"))
    else:
        raise _unsupported_implementation(site.implementation, type(module).__name__)
    out_BTNH, weight_TN = attended.merge_with_text(text_BTNH, lse_BNT)
    if forward.recorder is not None:
        forward.recorder.record(site.layer, attended, weight_TN)
    if weights_BNTS is not None:
        text_share_BNT1 = 1 - weight_TN.view(*text_BTNH.shape[:3]).transpose(1, 2)[..., None]
        weights_BNTS = weights_BNTS * text_share_BNT1.to(weights_BNTS.dtype)
    return out_BTNH, weights_BNTS


AttentionInterface.register(ATTENTION_NAME, _knowledge_attention)


def attention_modules(base_model: PreTrainedModel) -> dict[int, Any]:
    """The decoder's self-attention modules that use the library's attention interface, by layer.

    Raises:
        UnsupportedModelError: it has none, or encodes and decodes.
    """
    name = type(base_model).__name__
    if getattr(base_model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError("not a decoder-only model", where=name, help="attach to a decoder, such as Llama")
    decoder: nn.Module = base_model.get_decoder() if hasattr(base_model, "get_decoder") else base_model
    found: dict[int, Any] = {
        module.layer_idx: module  # type: ignore[misc]
        for module in decoder.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and _uses_attention_interface(module)
    }
    if not found:
        raise UnsupportedModelError(
            "no layer calls the attention interface of transformers",
            where=name,
            help="use a decoder whose modelling file looks its attention up in ALL_ATTENTION_FUNCTIONS",
        )
    return found


def _uses_attention_interface(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def _eager_function(module: nn.Module) -> Callable[..., tuple[torch.Tensor, Any]]:
    return inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]


def _refuse_unsupported(base_model: PreTrainedModel, modules: dict[int, Any]) -> None:
    name = type(base_model).__name__
    implementation = base_model.config._attn_implementation
    if implementation not in SUPPORTED:
        raise _unsupported_implementation(implementation, name)
    config = base_model.config.get_text_config(decoder=True)
    head_dim = BaseShape.of(base_model.config).head_dim
    for module in modules.values():
        widths = {getattr(module, width, head_dim) for width in ("head_dim", "qk_head_dim", "v_head_dim")}
        if widths != {head_dim}:
            raise UnsupportedModelError(
                f"heads of several widths: {sorted({*widths, head_dim})}",
                where=name,
                help="choose a base model whose keys, queries and values have one head dimension",
            )
        if getattr(module, "sinks", None) is not None:
            raise UnsupportedModelError("attention sinks", where=name, help="choose a base model without them")
        softcap = getattr(module, "attn_logit_softcapping", None) or getattr(config, "attn_logit_softcapping", None)
        if softcap is not None:
            raise UnsupportedModelError(
                f"attention logits are capped at {softcap}", where=name, help="choose a base model without soft-capping"
            )


def _refuse_other_terms(implementation: str, where: str, kwargs: dict[str, Any]) -> None:
    """Some layers hand terms of their softmax to the attention function: what is not in the log-sum-exp is refused."""
    # `sdpa` gets position biases as a mask, which the log-sum-exp has; the names are the library's.
    refused = ["sinks", "s_aux", "softcap"] + ["position_bias"] * (implementation != "sdpa")
    for term in refused:
        if kwargs.get(term) is not None:
            raise UnsupportedModelError(
                f"its attention has {term!r}, which cannot be merged with",
                where=where,
                help='load the base model with attn_implementation="sdpa", or choose another without it',
            )


def _unsupported_implementation(implementation: str, where: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the attention implementation {implementation!r} gives no log-sum-exp to merge with",
        where=where,
        help='load the base model with attn_implementation="sdpa"',
    )


def _input_shape(args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
    """Batch size and number of tokens of a call of the base model."""
    ids = args[0] if args else kwargs.get("input_ids")
    ids = kwargs.get("inputs_embeds") if ids is None else ids
    if ids is None:
        raise UnsupportedModelError("a call without input_ids", where="base model", help="give input_ids")
    return ids.shape[0], ids.shape[1]
