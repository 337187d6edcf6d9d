"""Which knowledge memory each token of a batch attends to, and the attention of one KB layer over all of them.

Shape legend: B batch, T prompt tokens, M facts, N query heads, H head dim.

Rows that attend to the same facts are worked on together, whatever their priors are; rows without knowledge never
enter, so that their output is the base model's to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.layer_facts import Form, LayerQuery, LogWeights, ScaleOf, layer_form, layer_query
from kblam_ray.attention.memory import ChunkView, KnowledgeMemory
from kblam_ray.attention.projections import Projections, exact_dtype, is_differentiable, requires_grad
from kblam_ray.attention.softmax import NO_FACTS, attend, merge, part_weight
from kblam_ray.errors import InputError, UnsupportedModelError

Knowledge = KnowledgeMemory | Sequence[KnowledgeMemory | None] | None
"""What a caller gives: one memory for all rows, or one (or None) per row."""


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one forward pass, flattened over the batch, and what it attends to."""

    memory: KnowledgeMemory | None
    start: int
    stop: int


def segments_of_rows(knowledge: Knowledge, batch_size: int, num_tokens: int) -> list[Segment]:
    """One segment per row of a [batch_size, num_tokens] batch.

    A batch with several rows for each row of knowledge (beams, several answers per prompt) repeats the knowledge
    row by row, as `generate` repeats prompts.

    Raises:
        InputError: other things than memories, or their number does not fit the batch.
    """
    if knowledge is None or isinstance(knowledge, KnowledgeMemory):
        return [Segment(knowledge, 0, batch_size * num_tokens)]
    rows = list(knowledge) if isinstance(knowledge, Sequence) and not isinstance(knowledge, str) else [knowledge]
    strangers = [type(row).__name__ for row in rows if not isinstance(row, KnowledgeMemory | None)]
    if strangers:
        raise InputError(
            f"{strangers[0]} is no knowledge memory",
            where="knowledge",
            help="give memories: `KnowledgeModel.load` makes one of a knowledge base",
        )
    if not rows or batch_size % len(rows):
        raise InputError(
            f"{len(rows)} knowledge memories for a batch of {batch_size} rows",
            where="knowledge",
            help="give one memory for all rows, or a list with one memory or None per row",
        )
    repeat = batch_size // len(rows)
    return [
        Segment(memory, row * num_tokens, (row + 1) * num_tokens)
        for row, memory in enumerate(memory for memory in rows for _ in range(repeat))
    ]


@dataclass(frozen=True)
class Group:
    """Tokens that attend to the same facts through the same adapter, each perhaps with a prior of its own.

    Attributes:
        memory: any one of their memories.
        tokens: int64, the tokens among all of the batch; None for all of them.
        log_weights: per view, what is added to the logits.
    """

    memory: KnowledgeMemory
    tokens: torch.Tensor | None
    log_weights: tuple[LogWeights | None, ...]

    @property
    def adapter(self) -> KnowledgeAdapter:
        return self.memory.adapter

    def views(self) -> Iterator[tuple[ChunkView, LogWeights | None]]:
        return zip(self.memory.views, self.log_weights, strict=True)

    def is_recorded(self, hidden_TX: torch.Tensor) -> bool:
        """Whether autograd is on and something here wants a gradient: hidden states, adapter or embeddings."""
        return torch.is_grad_enabled() and (
            hidden_TX.requires_grad
            or requires_grad(self.adapter)
            or any(
                embeddings_MP.requires_grad
                for view in self.memory.views
                for embeddings_MP in (view.chunk.keys_MP, view.chunk.values_MP)
            )
        )

    def only(self, wanted_T: torch.Tensor) -> Group | None:
        """The group with those of its tokens that are wanted; None when there are none."""
        places = wanted_T
        if self.tokens is not None:
            places = torch.isin(self.tokens, wanted_T).nonzero().squeeze(1)
        if not len(places):
            return None
        tokens = places if self.tokens is None else self.tokens[places]
        taken = (None if weights is None else weights.take(places) for weights in self.log_weights)
        return Group(self.memory, tokens, tuple(taken))


class Recorder(Protocol):
    """Watches the attention of KB layers, see `trace.py`."""

    def record(self, layer: int, attended: Attended, weight_TN: torch.Tensor) -> None:
        """Called once per KB layer: what was attended to, and the facts' weight beside the text for each token."""


class ForwardPass:
    """One forward pass of a base model with knowledge: who attends to what, and what its KB layers share.

    Args:
        segments: who attends to what, together all tokens of the batch.
        recorder: sees every KB layer's attention.
        last_tokens: the last decoder layer, and the tokens whose output of it is wanted; others have none of the
            facts there. None: all are wanted.

    Attributes:
        groups: the tokens by what they attend to; tokens without facts are in none.
        served: KB layers whose attention had its knowledge.
        is_over: the base model has run; gradient checkpointing may yet repeat its layers.
    """

    def __init__(
        self,
        segments: list[Segment],
        device: torch.device,
        recorder: Recorder | None = None,
        last_tokens: tuple[int, torch.Tensor] | None = None,
    ) -> None:
        self.num_tokens = segments[-1].stop if segments else 0
        self.groups = [_group(members, self.num_tokens, device) for members in _by_facts(segments).values()]
        self.recorder = recorder
        self.served: set[int] = set()
        self.is_over = False
        self._last_tokens = last_tokens
        self._records = any(is_differentiable(group.adapter) for group in self.groups)
        # Here and not when a layer first asks: gradient checkpointing repeats layers, not what came before them.
        self._projections = {group.adapter: Projections.of(group.adapter) for group in self.groups}
        self._scales = {
            (group.adapter, view.serial): self._make_scale(group.adapter, view)
            for group in self.groups
            if group.adapter.config.kind == "paper"
            for view in group.memory.views
        }

    @property
    def layers(self) -> set[int]:
        """KB layers at which some token attends to facts."""
        return {layer for group in self.groups for layer in group.adapter.config.layers}

    def attend(self, layer: int, hidden_TX: torch.Tensor) -> Attended | None:
        """The attention over facts of one layer, for the hidden states of all tokens [T, hidden]; None: nobody's.

        Differentiable in the adapter's weights and the hidden states when autograd is on.
        """
        self._check_call(layer, hidden_TX)
        self.served.add(layer)
        if self._records and not torch.is_grad_enabled():
            # That kind runs each layer without autograd first, then with it, one backward pass per layer: what the
            # layers share would belong to the first of those only.
            raise UnsupportedModelError(
                "gradient checkpointing of the kind use_reentrant=True",
                where=f"layer {layer}",
                help='enable it with gradient_checkpointing_kwargs={"use_reentrant": False}',
            )
        groups = [group for group in self.groups if layer in group.adapter.config.layers]
        if self._last_tokens is not None and layer == self._last_tokens[0]:
            groups = [found for group in groups if (found := group.only(self._last_tokens[1])) is not None]
        if not groups:
            return None
        # Without anything to differentiate the facts are worked on in blocks, even where autograd was left on.
        with torch.set_grad_enabled(any(group.is_recorded(hidden_TX) for group in groups)):
            queries: dict[KnowledgeAdapter, LayerQuery] = {}
            attended = None
            for group in groups:
                if group.adapter not in queries:
                    projections = self._projections[group.adapter]
                    queries[group.adapter] = layer_query(group.adapter, layer, projections, hidden_TX)
                part = self._attend_group(group, layer, queries[group.adapter].take(group.tokens))
                attended = part if attended is None else attended.beside(part)
            return attended

    def _check_call(self, layer: int, hidden_TX: torch.Tensor) -> None:
        if layer in self.served and not self.is_over:
            wrong = "its attention runs several times in one pass"
        elif len(hidden_TX) != self.num_tokens:
            wrong = f"its attention has {len(hidden_TX)} tokens of the {self.num_tokens} given"
        else:
            return
        raise UnsupportedModelError(
            wrong,
            where=f"layer {layer}",
            help="choose a base model whose layers each run once, over all tokens",
        )

    def _attend_group(self, group: Group, layer: int, query: LayerQuery) -> Attended:
        adapter, memory = group.adapter, group.memory
        form = layer_form(adapter, layer, query, self._projections[adapter], memory.form, self._scale_of(adapter))
        parts = [attend(form.query_ATD, form.bias_AT, form.facts(*view)) for view in group.views()]
        mixed_ATV, lse_AT = parts[0]
        for part in parts[1:]:
            mixed_ATV, lse_AT = merge(mixed_ATV, lse_AT, *part)
        out_TNH, lse_TN = form.finish(mixed_ATV, lse_AT)
        # `log C - log M` on every KB logit is one addition to the log-sum-exp.
        if adapter.config.kb_scale is not None:
            lse_TN = lse_TN + (math.log(adapter.config.kb_scale) - memory.log_num_facts)
        return Attended(out_TNH, lse_TN, [AttendedGroup(group, form, lse_AT)], self.num_tokens)

    def _scale_of(self, adapter: KnowledgeAdapter) -> ScaleOf:
        return lambda view: self._scales[adapter, view.serial]

    def _make_scale(self, adapter: KnowledgeAdapter, view: ChunkView) -> torch.Tensor:
        if is_differentiable(adapter):
            return self._projections[adapter].fact_scale(view.rows(view.chunk.keys_MP))
        kept_M = view.chunk.fact_scale_M(adapter)
        assert kept_M is not None
        return view.rows(kept_M)


@dataclass(frozen=True)
class AttendedGroup:
    """What the trace needs to find the share of each fact afterwards."""

    group: Group
    form: Form
    lse_AT: torch.Tensor


@dataclass(frozen=True)
class Attended:
    """Attention over facts of some tokens: outputs [t, N, H] and log-sum-exps [t, N], the shift included."""

    out_TNH: torch.Tensor
    lse_TN: torch.Tensor
    groups: list[AttendedGroup]
    num_tokens: int

    def beside(self, other: Attended) -> Attended:
        """Both, over all tokens of the batch; no token is in two groups."""
        mine, others = self.spread(), other.spread()
        out_TNH = mine.out_TNH + others.out_TNH
        lse_TN = torch.where(others.lse_TN == NO_FACTS, mine.lse_TN, others.lse_TN)
        return Attended(out_TNH, lse_TN, self.groups + other.groups, self.num_tokens)

    def spread(self) -> Attended:
        """Over all tokens of the batch: output 0 and log-sum-exp -inf for those without facts."""
        if len(self.out_TNH) == self.num_tokens:
            return self
        tokens = self.groups[0].group.tokens
        assert tokens is not None
        out_TNH = self.out_TNH.new_zeros(self.num_tokens, *self.out_TNH.shape[1:])
        lse_TN = self.lse_TN.new_full((self.num_tokens, self.lse_TN.shape[1]), NO_FACTS)
        out_TNH = out_TNH.index_copy(0, tokens, self.out_TNH)
        return Attended(out_TNH, lse_TN.index_copy(0, tokens, self.lse_TN), self.groups, self.num_tokens)

    def merge_with_text(self, text_BTNH: torch.Tensor, lse_BNT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One softmax over [facts | text]: outputs [B, T, N, H] in the text's dtype, and the facts' weight [T, N].

        A token without facts keeps the text's output to the bit.
        """
        spread = self.spread()
        lse_text_TN = lse_BNT.transpose(1, 2).flatten(0, 1).to(spread.lse_TN.dtype)
        weight_TN = part_weight(spread.lse_TN, lse_text_TN)
        text_TNH = text_BTNH.flatten(0, 1).to(exact_dtype(text_BTNH.dtype))
        out_TNH = torch.lerp(text_TNH, spread.out_TNH.to(text_TNH.dtype), weight_TN[..., None])
        out_TNH = torch.where(spread.lse_TN[..., None] == NO_FACTS, text_TNH, out_TNH)
        # Contiguous, as the library's own functions give it: some families take a view of it.
        return out_TNH.to(text_BTNH.dtype).view(text_BTNH.shape).contiguous(), weight_TN


def _by_facts(segments: list[Segment]) -> dict[tuple, list[Segment]]:
    found: dict[tuple, list[Segment]] = {}
    for segment in segments:
        memory = segment.memory
        if memory is not None and memory.num_facts and segment.stop > segment.start:
            found.setdefault((id(memory.adapter), memory.form, memory.facts_key), []).append(segment)
    return found


def _group(members: list[Segment], num_tokens: int, device: torch.device) -> Group:
    memories = [segment.memory for segment in members if segment.memory is not None]
    lengths = [segment.stop - segment.start for segment in members]
    tokens = None
    if sum(lengths) < num_tokens:
        tokens = torch.cat([torch.arange(segment.start, segment.stop) for segment in members]).to(device)
    distinct = list({_prior_key(memory): memory for memory in memories}.values())
    place_T = None
    if len(distinct) > 1:
        keys = [_prior_key(memory) for memory in distinct]
        places = torch.tensor([keys.index(_prior_key(memory)) for memory in memories])
        place_T = places.repeat_interleave(torch.tensor(lengths)).to(device)
    log_weights = tuple(_log_weights(distinct, place, place_T) for place in range(len(memories[0].views)))
    return Group(memories[0], tokens, log_weights)


def _prior_key(memory: KnowledgeMemory) -> int:
    return 0 if memory.priors is None else id(memory.priors)


def _log_weights(memories: list[KnowledgeMemory], view_place: int, place_T: torch.Tensor | None) -> LogWeights | None:
    """The distinct log weights of one view of memories that differ only by their prior."""
    rows = []
    for memory in memories:
        view = memory.views[view_place]
        rows.append(view.log_weights_M if memory.priors is None else memory.priors[view_place])
    if all(row_M is None for row_M in rows):
        return None
    like = next(row_M for row_M in rows if row_M is not None)
    return LogWeights(torch.stack([torch.zeros_like(like) if row_M is None else row_M for row_M in rows]), place_T)
