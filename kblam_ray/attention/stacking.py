"""Groups of tokens that each attend to facts of their own, worked on as one: their facts stand in one padded tensor.

Shape legend: R groups (the rows of a stack), T tokens of each, M facts of the group that has most,
A rows of queries per token (query heads, or 1 where they share a score), N query heads, H head dim, P encoder dim,
D numbers in a key, V numbers in a value, Z slots times N*H.

One after the other, the rows of a training batch would cost a dozen small operations each, per KB layer. Stacked, a KB
layer is one batched product, [R, A*T, D] with [R, D, M], and exactly the same attention: where a group has fewer facts
than another, log weights of -inf hide the padding.

What the layers share (embeddings in the dtype of the hidden states, the scales of facts, or projected keys and values)
is made before the first layer runs and not when it asks: gradient checkpointing repeats layers, not what came before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch.nn.utils.rnn import pad_sequence

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.groups import Group
from kblam_ray.attention.layer_facts import Form, LayerQuery, is_cheaper_expanded, layer_form
from kblam_ray.attention.memory import ChunkView
from kblam_ray.attention.projections import Projections, scale_of_keys
from kblam_ray.attention.softmax import NO_FACTS, attend

MOST_PADDING = 1.5
"""Groups are stacked as long as their padded facts are at most this many times their facts."""

NUMBERS_COPIED = 2**24
"""Embedding numbers that a stack copies where nothing is differentiated; more are attended to where they are."""

NUMBERS_PROJECTED = 2**28
"""Projected keys and values that a stack holds; where there would be more, it stays latent."""


def alike(groups: Iterable[Group]) -> list[list[Group]]:
    """Lists of groups that can be stacked: of one adapter, one number of tokens and about as many facts."""

    def kind(group: Group) -> tuple:
        return id(group.adapter), group.num_tokens, str(group.memory.dtype)

    found: list[list[Group]] = []
    for _, members in groupby(sorted(groups, key=lambda group: (*kind(group), -group.num_rows)), key=kind):
        stack: list[Group] = []
        for group in members:
            padded = (len(stack) + 1) * (stack[0] if stack else group).num_rows
            if not stack or padded > MOST_PADDING * sum(other.num_rows for other in (*stack, group)):
                found.append(stack := [])
            stack.append(group)
    # In the order of the batch, where they were sorted by size: then the stack's tokens often are the batch's.
    return [sorted(stack, key=lambda group: -1 if group.first is None else group.first) for stack in found]


def is_cheap_to_copy(groups: Sequence[Group]) -> bool:
    """Whether stacking pays where nothing is differentiated: several groups with few facts, none of them projected."""
    numbers = 2 * len(groups) * max(group.num_rows * group.adapter.config.dim for group in groups)
    return len(groups) > 1 and numbers <= NUMBERS_COPIED and all(group.memory.form == "latent" for group in groups)


class Stack:
    """Groups of equally many tokens through one adapter, and all of their facts.

    Args:
        groups: R groups of T tokens each, as `alike` gives them; a memory's form does not matter here.
        num_tokens: of the whole batch.
        dtype: what the hidden states will be; another one is right, too, and costs a cast in each layer.

    Attributes:
        tokens: int64 [R * T], the tokens among all of the batch, group by group; None for all of them in their order.
        num_facts: M.
    """

    def __init__(self, groups: Sequence[Group], num_tokens: int, projections: Projections, dtype: torch.dtype) -> None:
        self.groups = tuple(groups)
        self.tokens = _tokens(groups, num_tokens)
        self.adapter: KnowledgeAdapter = groups[0].adapter
        self._num_tokens = groups[0].num_tokens
        self._projections = projections
        config = self.adapter.config
        keys_RMP = _padded([[view.rows(view.chunk.keys_MP) for view in group.memory.views] for group in groups])
        values_RMP = _padded([[view.rows(view.chunk.values_MP) for view in group.memory.views] for group in groups])
        self.num_facts = keys_RMP.shape[1]
        self._weights_RTM = _log_weights(groups, self.num_facts, keys_RMP.device)
        self._scale_RM: torch.Tensor | None = None
        self._projected: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._embeddings = (keys_RMP, values_RMP)
        if config.kind == "paper" and self._is_cheaper_projected():
            self._project(keys_RMP, values_RMP, dtype)
            return
        if config.kind == "paper":
            self._scale_RM = self._scales(keys_RMP)
        if not (keys_RMP.requires_grad or values_RMP.requires_grad):
            # Embeddings with a gradient are cast in each layer: what checkpointing repeats must record it again.
            self._embeddings = (keys_RMP.to(dtype), values_RMP.to(dtype))

    @property
    def layers(self) -> tuple[int, ...]:
        """KB layers of the adapter."""
        return self.adapter.config.layers

    def only(self, wanted_T: torch.Tensor) -> Stack | list[Group]:
        """The stack with those of its tokens that are wanted; or groups, where these have different numbers of them."""
        found = [group.only(wanted_T) for group in self.groups]
        taken = [group for group in found if group is not None]
        if len(taken) < len(self.groups) or len({group.num_tokens for group in taken}) > 1:
            return taken
        stack = Stack.__new__(Stack)
        stack.__dict__.update(self.__dict__)
        stack.groups, stack._num_tokens, stack.tokens = tuple(taken), taken[0].num_tokens, _tokens(taken, -1)
        stack._weights_RTM = _log_weights(taken, self.num_facts, self._embeddings[0].device)
        return stack

    def is_recorded(self, hidden_TX: torch.Tensor) -> bool:
        """See `Group.is_recorded`."""
        return any(group.is_recorded(hidden_TX) for group in self.groups)

    def attend(self, layer: int, query: LayerQuery) -> StackAttended:
        """The attention of one KB layer, for the queries of all tokens of the batch."""
        query = query.take(self.tokens)
        is_projected = bool(self._projected)
        form = layer_form(
            self.adapter, layer, query, self._projections, "latent", lambda view: None, is_expanded=is_projected
        )
        facts = self._facts(layer, len(form.query_ATD), query.query.dtype)
        stacked = facts.split(form.query_ATD)
        bias = None if form.bias_AT is None else facts.split(form.bias_AT[..., None]).squeeze(-1)
        mixed, lse = attend(stacked, bias, facts)
        out_TNH, lse_TN = form.finish(facts.join(mixed), facts.join(lse[..., None]).squeeze(-1))
        return StackAttended(self, layer, query, stacked, bias, facts, lse.view(facts.shape_RAT), out_TNH, lse_TN)

    def log_num_facts(self, like_TN: torch.Tensor) -> float | torch.Tensor:
        """log M of the shift, as `KnowledgeMemory.log_num_facts`: one number, or one per token [R * T, 1]."""
        logs = [group.memory.log_num_facts for group in self.groups]
        if len(set(logs)) == 1:
            return logs[0]
        logs_R1 = torch.tensor(logs, dtype=like_TN.dtype).to(like_TN.device)[:, None]
        return logs_R1.expand(-1, self._num_tokens).reshape(-1, 1)

    @property
    def may_be_empty(self) -> bool:
        """Whether a token may see no fact at all: its facts have priors, or are hidden."""
        return any(group.may_be_empty for group in self.groups)

    def scale_of(self, row: int, view: ChunkView) -> torch.Tensor | None:
        """r_m of the facts of one view of group `row`, see `projections.fact_scale`."""
        if self._scale_RM is None:
            return None
        views = list(self.groups[row].memory.views)
        start = sum(other.num_rows for other in views[: [other.serial for other in views].index(view.serial)])
        return self._scale_RM[row, start : start + view.num_rows]

    def _facts(self, layer: int, num_rows: int, dtype: torch.dtype) -> StackedFacts:
        shape_RAT = (len(self.groups), num_rows, self._num_tokens)
        if self._projected:
            keys, values = (part.to(dtype) for part in self._projected[layer])
            return StackedFacts(keys, values, None, self._weights_RTM, shape_RAT, is_per_head=True)
        keys, values = (part.to(dtype) for part in self._embeddings)
        scale_R1M = None if self._scale_RM is None else self._scale_RM[:, None]
        return StackedFacts(keys, values, scale_R1M, self._weights_RTM, shape_RAT, is_per_head=False)

    def _is_cheaper_projected(self) -> bool:
        config, shape = self.adapter.config, self.adapter.config.base_shape
        numbers = 2 * len(self.groups) * self.num_facts * config.slots * config.heads_width
        return numbers <= NUMBERS_PROJECTED and is_cheaper_expanded(
            num_tokens=self._num_tokens, head_dim=shape.head_dim, dim=config.dim
        )

    def _project(self, keys_RMP: torch.Tensor, values_RMP: torch.Tensor, dtype: torch.dtype) -> None:
        """Keys and values of all KB layers [R * N, M, H], the keys with the LayerNorm applied."""
        config, shape = self.adapter.config, self.adapter.config.base_shape
        heads = (config.slots, shape.num_heads, shape.head_dim)
        weights = self._projections.whole(dtype)
        keys_RMZ = torch.nn.functional.linear(keys_RMP.to(dtype), weights.key_ZP, weights.key_bias_Z)
        values_RMZ = torch.nn.functional.linear(values_RMP.to(dtype), weights.value_ZP, weights.value_bias_Z)
        self._scale_RM = scale_of_keys(keys_RMZ)
        keys_RMZ = keys_RMZ * self._scale_RM[..., None].to(keys_RMZ.dtype)
        keys, values = (
            # One slot's heads side by side, so that a layer's product reads them without a stride.
            part_RMZ.unflatten(-1, heads).permute(2, 0, 3, 1, 4).flatten(1, 2).contiguous().unbind(0)
            for part_RMZ in (keys_RMZ, values_RMZ)
        )
        for layer in config.layers:
            slot = config.slot_of(layer)
            self._projected[layer] = (keys[slot], values[slot])

    def _scales(self, keys_RMP: torch.Tensor) -> torch.Tensor:
        if not self._projections.is_kept:
            return self._projections.fact_scale(keys_RMP.flatten(0, 1)).view(keys_RMP.shape[:2])
        if keys_RMP.requires_grad and torch.is_grad_enabled():
            return self._projections.fact_scale(keys_RMP.flatten(0, 1)).view(keys_RMP.shape[:2])
        return _padded([[_kept_scale(view, self.adapter) for view in group.memory.views] for group in self.groups])


@dataclass(frozen=True)
class StackedFacts:
    """The facts of a stack as one KB layer scores and mixes them: `softmax.Facts`.

    Attributes:
        keys, values: [R, M, D] and [R, M, V] for all rows of queries alike, or [R * A, M, H] each.
        scale_R1M: what scores are multiplied by, or None.
        weights_RTM: what is added to the logits [R, T or 1, M], or None.
        shape_RAT: R, A and T.
        is_per_head: rows of queries have keys and values of their own.
    """

    keys: torch.Tensor
    values: torch.Tensor
    scale_R1M: torch.Tensor | None
    weights_RTM: torch.Tensor | None
    shape_RAT: tuple[int, int, int]
    is_per_head: bool

    @property
    def num_rows(self) -> int:
        return self.keys.shape[1]

    def block(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys[:, rows], self.values[:, rows]

    def scale_M(self) -> torch.Tensor | None:
        return self.scale_R1M

    def log_weights(self, rows: slice, tokens: slice) -> torch.Tensor | None:
        if self.weights_RTM is None:
            return None
        weights = self.weights_RTM[..., rows]
        num_rows = self.shape_RAT[1]
        if self.is_per_head:
            weights = weights.repeat_interleave(num_rows, 0)
        elif weights.shape[1] > 1:
            weights = weights.repeat(1, num_rows, 1)
        return weights if weights.shape[1] == 1 else weights[:, tokens]

    def split(self, numbers_AXD: torch.Tensor) -> torch.Tensor:
        """From [A, R * T, D] to [R, A * T, D], or [R * A, T, D] per head."""
        groups, _, tokens = self.shape_RAT
        numbers_RATD = numbers_AXD.unflatten(1, (groups, tokens)).transpose(0, 1)
        return numbers_RATD.flatten(0, 1) if self.is_per_head else numbers_RATD.flatten(1, 2)

    def join(self, numbers: torch.Tensor) -> torch.Tensor:
        """From what `split` gives, to [A, R * T, D]."""
        return numbers.reshape(*self.shape_RAT, -1).transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True)
class StackAttended:
    """The attention of one KB layer over the facts of a stack.

    Attributes:
        query: the queries of its tokens, group by group.
        stacked_query, stacked_bias: what was scored, as `facts.split` lays it out.
        facts: what it was scored against.
        lse_RAT: log-sum-exp of each row of queries' logits without `log C - log M` and without gates.
        out_TNH, lse_TN: what the heads got, [R * T, N, H] and [R * T, N].
    """

    stack: Stack
    layer: int
    query: LayerQuery
    stacked_query: torch.Tensor
    stacked_bias: torch.Tensor | None
    facts: StackedFacts
    lse_RAT: torch.Tensor
    out_TNH: torch.Tensor
    lse_TN: torch.Tensor

    def form_of(self, row: int) -> tuple[Form, torch.Tensor]:
        """The form of one group's attention as if it stood alone, and the log-sum-exps of its scores [A, T]."""
        group, tokens = self.stack.groups[row], self.facts.shape_RAT[2]
        query = self.query.take(slice(row * tokens, (row + 1) * tokens))
        form = layer_form(
            self.stack.adapter,
            self.layer,
            query,
            self.stack._projections,
            group.memory.form,
            lambda view: self.stack.scale_of(row, view),
        )
        return form, self.lse_RAT[row]


def _tokens(groups: Sequence[Group], num_tokens: int) -> torch.Tensor | None:
    if len(groups) == 1:
        return groups[0].tokens
    starts = [group.first for group in groups]
    follow = all(before is not None and after == before + groups[0].num_tokens for before, after in pairwise([*starts]))
    if follow and starts[0] == 0 and len(groups) * groups[0].num_tokens == num_tokens:
        return None
    tokens = [group.tokens for group in groups if group.tokens is not None]
    assert len(tokens) == len(groups)
    return torch.cat(tokens)


def _padded(parts: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """Per group the parts of its views, one after the other, with zeros behind those of groups with fewer facts."""
    joined = [pieces[0] if len(pieces) == 1 else torch.cat(list(pieces)) for pieces in parts]
    return pad_sequence(joined, batch_first=True) if len(joined) > 1 else joined[0][None]


def _log_weights(groups: Sequence[Group], num_facts: int, device: torch.device) -> torch.Tensor | None:
    """What is added to the logits [R, T or 1, M]: priors, and -inf for hidden facts and padding; None for nothing."""
    sizes = [group.num_rows for group in groups]
    if min(sizes) == num_facts and all(weights is None for group in groups for weights in group.log_weights):
        return None
    by_token = any(
        weights is not None and weights.place_T is not None for group in groups for weights in group.log_weights
    )
    num_tokens = groups[0].num_tokens if by_token else 1
    rows = []
    for group in groups:
        weights_TM = torch.full((num_tokens, num_facts), NO_FACTS, device=device)
        start = 0
        for view, weights in group.views():
            stop = start + view.num_rows
            everything = slice(0, view.num_rows)
            weights_TM[:, start:stop] = 0.0 if weights is None else weights.block(everything, slice(0, num_tokens))
            start = stop
        rows.append(weights_TM)
    return torch.stack(rows)


def _kept_scale(view: ChunkView, adapter: KnowledgeAdapter) -> torch.Tensor:
    kept_M = view.chunk.fact_scale_M(adapter)
    assert kept_M is not None
    return view.rows(kept_M)
