"""Which knowledge memory each token of a batch attends to: tokens that attend to the same facts form a group.

Shape legend: B batch, T prompt tokens, M facts, K distinct priors.

Rows that attend to the same facts are worked on together, whatever their priors are; rows without knowledge are in no
group, so that their output is the base model's to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.layer_facts import LogWeights
from kblam_ray.attention.memory import ChunkView, KnowledgeMemory
from kblam_ray.attention.projections import requires_grad
from kblam_ray.errors import InputError

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
        num_tokens: how many they are.
        first: the first of them where they follow each other without a gap, else None.
    """

    memory: KnowledgeMemory
    tokens: torch.Tensor | None
    log_weights: tuple[LogWeights | None, ...]
    num_tokens: int
    first: int | None = None

    @property
    def adapter(self) -> KnowledgeAdapter:
        return self.memory.adapter

    def views(self) -> Iterator[tuple[ChunkView, LogWeights | None]]:
        return zip(self.memory.views, self.log_weights, strict=True)

    @property
    def num_rows(self) -> int:
        """Rows of facts that an attention goes through."""
        return sum(view.num_rows for view in self.memory.views)

    @property
    def may_be_empty(self) -> bool:
        """Whether a token may see no fact at all: facts have priors, or are hidden."""
        return any(weights is not None for weights in self.log_weights)

    def has_own_gradient(self) -> bool:
        """Whether autograd is on and the adapter or embeddings want a gradient."""
        return torch.is_grad_enabled() and (
            requires_grad(self.adapter)
            or any(
                embeddings_MP.requires_grad
                for view in self.memory.views
                for embeddings_MP in (view.chunk.keys_MP, view.chunk.values_MP)
            )
        )

    def is_recorded(self, hidden_TX: torch.Tensor) -> bool:
        """Whether autograd is on and something here wants a gradient: hidden states, adapter or embeddings."""
        return (torch.is_grad_enabled() and hidden_TX.requires_grad) or self.has_own_gradient()

    def only(self, wanted_T: torch.Tensor) -> Group | None:
        """The group with those of its tokens that are wanted; None when there are none."""
        places = wanted_T
        if self.tokens is not None:
            places = torch.isin(self.tokens, wanted_T).nonzero().squeeze(1)
        if not len(places):
            return None
        tokens = places if self.tokens is None else self.tokens[places]
        taken = (None if weights is None else weights.take(places) for weights in self.log_weights)
        return Group(self.memory, tokens, tuple(taken), len(tokens))


def groups_of(segments: list[Segment], num_tokens: int, device: torch.device) -> list[Group]:
    """The tokens of a batch by what they attend to; tokens without facts are in none."""
    return [_group(members, num_tokens, device) for members in _by_facts(segments).values()]


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
    has_gap = any(before.stop != after.start for before, after in pairwise(members))
    return Group(memories[0], tokens, log_weights, sum(lengths), None if has_gap else members[0].start)


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
