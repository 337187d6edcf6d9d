"""The attention over facts of one forward pass: what each KB layer adds to the text's, for all tokens of a batch.

Shape legend: B batch, T prompt tokens, M facts, N query heads, H head dim.

Tokens that attend to the same facts are a group; groups that are alike are stacked and worked on as one, always where
autograd records the adapter, and else where they are small. Rows without knowledge never enter, so that their output is
the base model's to the bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.groups import Group, Knowledge, Segment, groups_of, segments_of_rows
from kblam_ray.attention.layer_facts import Form, LayerQuery, ScaleOf, layer_form, layer_query
from kblam_ray.attention.memory import ChunkView
from kblam_ray.attention.projections import Projections, exact_dtype, is_differentiable
from kblam_ray.attention.softmax import NO_FACTS, attend, merge, part_weight
from kblam_ray.attention.stacking import Stack, StackAttended, alike, is_cheap_to_copy
from kblam_ray.errors import UnsupportedModelError

__all__ = ["Attended", "AttendedGroup", "ForwardPass", "Group", "Knowledge", "Recorder", "Segment", "segments_of_rows"]


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
        dtype: what the hidden states will be, as far as can be known before; see `Stack`.

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
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.num_tokens = segments[-1].stop if segments else 0
        self.groups = groups_of(segments, self.num_tokens, device)
        self.recorder = recorder
        self.served: set[int] = set()
        self.is_over = False
        self._last_tokens = last_tokens
        self._records = any(is_differentiable(group.adapter) for group in self.groups)
        # Here and not when a layer first asks: gradient checkpointing repeats layers, not what came before them.
        self._projections = {group.adapter: Projections.of(group.adapter) for group in self.groups}
        for projections in self._projections.values():
            if not projections.is_kept:
                projections.cast(dtype)
        self._parts = self._stacked(dtype)
        self._scales = {
            (group.adapter, view.serial): self._make_scale(group.adapter, view)
            for group in self._parts
            if isinstance(group, Group) and group.adapter.config.kind == "paper"
            for view in group.memory.views
        }

    def _stacked(self, dtype: torch.dtype) -> list[Stack | Group]:
        recorded = [group for group in self.groups if group.has_own_gradient()]
        kept = [group for group in self.groups if not group.has_own_gradient()]
        parts: list[Stack | Group] = []
        for stack in alike(recorded):
            parts.append(Stack(stack, self.num_tokens, self._projections[stack[0].adapter], dtype))
        # Materialized keys and values lie ready where they are.
        for stack in alike(group for group in kept if group.memory.form == "latent"):
            if is_cheap_to_copy(stack):
                parts.append(Stack(stack, self.num_tokens, self._projections[stack[0].adapter], dtype))
            else:
                parts += stack
        return parts + [group for group in kept if group.memory.form != "latent"]

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
        parts = [part for part in self._parts if layer in part.adapter.config.layers]
        if self._last_tokens is not None and layer == self._last_tokens[0]:
            parts = _only(parts, self._last_tokens[1])
        if not parts:
            return None
        # Without anything to differentiate the facts are worked on in blocks, even where autograd was left on.
        with torch.set_grad_enabled(any(part.is_recorded(hidden_TX) for part in parts)):
            queries: dict[KnowledgeAdapter, LayerQuery] = {}
            for part in parts:
                if part.adapter not in queries:
                    projections = self._projections[part.adapter]
                    queries[part.adapter] = layer_query(part.adapter, layer, projections, hidden_TX)
            attended = [self._attend(part, layer, queries[part.adapter]) for part in parts]
            return attended[0] if len(attended) == 1 else Attended.side_by_side(attended)

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

    def _attend(self, part: Stack | Group, layer: int, query: LayerQuery) -> Attended:
        if isinstance(part, Stack):
            stacked = part.attend(layer, query)
            lse_TN = self._shifted(part.adapter, stacked.lse_TN, part.log_num_facts(stacked.lse_TN))
            return Attended(stacked.out_TNH, lse_TN, part.tokens, (stacked,), self.num_tokens, part.may_be_empty)
        adapter, memory, query = part.adapter, part.memory, query.take(part.tokens)
        form = layer_form(adapter, layer, query, self._projections[adapter], memory.form, self._scale_of(adapter))
        parts = [attend(form.query_ATD, form.bias_AT, form.facts(*view)) for view in part.views()]
        mixed_ATV, lse_AT = parts[0]
        for other in parts[1:]:
            mixed_ATV, lse_AT = merge(mixed_ATV, lse_AT, *other)
        out_TNH, lse_TN = form.finish(mixed_ATV, lse_AT)
        lse_TN = self._shifted(adapter, lse_TN, memory.log_num_facts)
        source = AttendedGroup(part, form, lse_AT)
        return Attended(out_TNH, lse_TN, part.tokens, (source,), self.num_tokens, part.may_be_empty)

    @staticmethod
    def _shifted(adapter: KnowledgeAdapter, lse_TN: torch.Tensor, log_num_facts: float | torch.Tensor) -> torch.Tensor:
        """`log C - log M` on every KB logit is one addition to the log-sum-exp."""
        scale = adapter.config.kb_scale
        return lse_TN if scale is None else lse_TN + (math.log(scale) - log_num_facts)

    def _scale_of(self, adapter: KnowledgeAdapter) -> ScaleOf:
        def scale_of(view: ChunkView) -> torch.Tensor:
            known = self._scales.get((adapter, view.serial))
            return self._make_scale(adapter, view) if known is None else known

        return scale_of

    def _make_scale(self, adapter: KnowledgeAdapter, view: ChunkView) -> torch.Tensor:
        if is_differentiable(adapter):
            return self._projections[adapter].fact_scale(view.rows(view.chunk.keys_MP))
        kept_M = view.chunk.fact_scale_M(adapter)
        assert kept_M is not None
        return view.rows(kept_M)


def _only(parts: list[Stack | Group], wanted_T: torch.Tensor) -> list[Stack | Group]:
    """The parts with those of their tokens that are wanted."""
    found: list[Stack | Group] = []
    for part in parts:
        taken = part.only(wanted_T)
        found += taken if isinstance(taken, list) else [] if taken is None else [taken]
    return found


@dataclass(frozen=True)
class AttendedGroup:
    """What a recorder needs to find the share of each fact of one group.

    Attributes:
        form: `form.query_ATD` and `form.bias_AT` are those of the group's tokens, in the order of `group.tokens`;
            `form.facts(view, log_weights)` the facts of each of `group.views()`.
        lse_AT: log-sum-exp of the group's logits without `log C - log M` and without gates.
    """

    group: Group
    form: Form
    lse_AT: torch.Tensor


@dataclass(frozen=True)
class Attended:
    """Attention over facts of some tokens: outputs [t, N, H] and log-sum-exps [t, N], the shift included.

    Attributes:
        tokens: int64 [t], which of the batch's tokens; None for all of them in their order.
        sources: how it came about, group by group or stack by stack.
        num_tokens: of the whole batch.
        may_be_empty: whether some of these tokens may see no fact at all.
    """

    out_TNH: torch.Tensor
    lse_TN: torch.Tensor
    tokens: torch.Tensor | None
    sources: tuple[AttendedGroup | StackAttended, ...]
    num_tokens: int
    may_be_empty: bool

    @classmethod
    def side_by_side(cls, parts: list[Attended]) -> Attended:
        """Several parts as one; no token is in two of them."""
        tokens = [part.tokens for part in parts if part.tokens is not None]
        return cls(
            torch.cat([part.out_TNH for part in parts]),
            torch.cat([part.lse_TN for part in parts]),
            torch.cat(tokens),
            tuple(source for part in parts for source in part.sources),
            parts[0].num_tokens,
            any(part.may_be_empty for part in parts),
        )

    @property
    def stacks(self) -> list[StackAttended]:
        """The stacks among its sources: all of them where autograd records the adapter or the embeddings."""
        return [source for source in self.sources if isinstance(source, StackAttended)]

    @cached_property
    def groups(self) -> list[AttendedGroup]:
        """Its sources group by group; those of a stack are made when asked for, with autograd where that is on."""
        found: list[AttendedGroup] = []
        for source in self.sources:
            if isinstance(source, AttendedGroup):
                found.append(source)
            else:
                found += [AttendedGroup(group, *source.form_of(row)) for row, group in enumerate(source.stack.groups)]
        return found

    @property
    def is_everywhere(self) -> bool:
        """Whether every token of the batch surely sees a fact."""
        return self.tokens is None and not self.may_be_empty

    def spread(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs and log-sum-exps of all tokens of the batch: 0 and -inf for those without facts."""
        if self.tokens is None:
            return self.out_TNH, self.lse_TN
        out_TNH = self.out_TNH.new_zeros(self.num_tokens, *self.out_TNH.shape[1:])
        lse_TN = self.lse_TN.new_full((self.num_tokens, self.lse_TN.shape[1]), NO_FACTS)
        return out_TNH.index_copy(0, self.tokens, self.out_TNH), lse_TN.index_copy(0, self.tokens, self.lse_TN)

    def merge_with_text(self, text_BTNH: torch.Tensor, lse_BNT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One softmax over [facts | text]: outputs [B, T, N, H] in the text's dtype, and the facts' weight [T, N].

        A token without facts keeps the text's output to the bit.
        """
        kb_TNH, lse_TN = self.spread()
        lse_text_TN = lse_BNT.transpose(1, 2).flatten(0, 1).to(lse_TN.dtype)
        weight_TN = torch.sigmoid(lse_TN - lse_text_TN) if self.is_everywhere else part_weight(lse_TN, lse_text_TN)
        text_TNH = text_BTNH.flatten(0, 1).to(exact_dtype(text_BTNH.dtype))
        out_TNH = torch.lerp(text_TNH, kb_TNH.to(text_TNH.dtype), weight_TN[..., None])
        if not self.is_everywhere:
            out_TNH = torch.where(lse_TN[..., None] == NO_FACTS, text_TNH, out_TNH)
        # Contiguous, as the library's own functions give it: some families take a view of it.
        return out_TNH.to(text_BTNH.dtype).view(text_BTNH.shape).contiguous(), weight_TN
