"""The question prior: the encoder that made the keys reads the question too, and says which facts it is near.

Added to the KB logits of every layer and token, it is what the words of the question tell; attention adds what the
sentence so far tells. Its hard form keeps only the facts that it ranks first: found by comparing every fact, or among
the candidates of an index where a chunk has one (`nearest`), whose scores are exact too.
Shape legend: M facts, K of them kept, P encoder dim.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.attention.memory.chunk import ChunkView
from kblam_ray.encoders.base import Encoder
from kblam_ray.errors import EncoderError, EncoderMismatchError, InputError
from kblam_ray.model.mentions import named_facts, named_rows
from kblam_ray.model.nearest import near_rows

if TYPE_CHECKING:
    from kblam_ray.attention.adapter.config import AdapterConfig

Conversation = Sequence[Mapping[str, str]] | str
"""Messages with role and content, or one question."""

BLOCK_ROWS = {"cpu": 4_096, "cuda": 262_144}
"""Facts whose keys are float32 at a time: few enough for a CPU's cache, enough to keep a GPU busy."""

_LOCKS: weakref.WeakKeyDictionary[Encoder, threading.Lock] = weakref.WeakKeyDictionary()


class QuestionPrior:
    """`beta * cos(enc(question), e_m) + gamma * [the question names fact m's entity]`, for one adapter's encoder.

    Args:
        encoder: the one that made the keys.
        beta: weight of the cosine; 0 is the paper's attention.
        context: the question is the last user message, or the last two.
        gamma: added where the entity occurs in the question, as a whole word in any case.
    """

    def __init__(
        self,
        encoder: Encoder,
        beta: float = 0.0,
        context: Literal["last", "last_two"] = "last",
        gamma: float = 0.0,
    ) -> None:
        if context not in ("last", "last_two"):
            raise InputError(f"there is no prior context {context!r}", help='give "last" or "last_two"')
        self.encoder, self.beta, self.context, self.gamma = encoder, beta, context, gamma
        # Priors with other settings may have the same encoder, and an encoder serves one thread at a time.
        self._encoding = _LOCKS.setdefault(encoder, threading.Lock())

    @classmethod
    def of(cls, config: AdapterConfig, encoder: Encoder) -> QuestionPrior:
        """With the settings of an adapter."""
        return cls(encoder, config.question_prior, config.prior_context, config.prior_lexical)

    def question(self, messages: Conversation) -> str:
        """What the prior reads of a conversation.

        Raises:
            InputError: there is no user message.
        """
        if isinstance(messages, str):
            return messages
        asked = [message["content"] for message in messages if message.get("role") == "user"]
        if not asked:
            raise InputError("the conversation has no message of the user", where="messages", help="ask something")
        return "\n".join(asked[-(1 if self.context == "last" else 2) :])

    def embed(self, question: str) -> torch.Tensor:
        """The question as a unit vector, float32 [P] on the CPU.

        Raises:
            EncoderError: the encoder failed, or gave nothing that has a direction.
        """
        with self._encoding:
            embedding_P = np.asarray(self.encoder.encode([question])[0], np.float32)
        norm = float(np.linalg.norm(embedding_P))
        if not np.isfinite(norm) or norm == 0:
            raise EncoderError(
                f"the question's embedding has the norm {norm}",
                where=self.encoder.spec.name,
                help="ask a question that has words, and check the encoder",
            )
        return torch.from_numpy(embedding_P / norm)

    def cosines(self, memory: KnowledgeMemory, question: str) -> torch.Tensor:
        """cos(enc(question), e_m), float32 [M] in the order of `memory.fact_ids`; 0 for a key that is zero.

        Raises:
            EncoderMismatchError: the keys have another dimension than the encoder.
        """
        if not memory.num_facts:
            self._check_dim(memory)
            return torch.zeros(0, device=memory.device)
        question_P = self._embedded_for(memory, question)
        parts = []
        for view in memory.views:
            cosines_M = _view_cosines(view, question_P)
            parts.append(cosines_M if view.positions is not None else view.live_rows(cosines_M))
        return torch.cat(parts)

    def names_entity(self, memory: KnowledgeMemory, question: str) -> torch.Tensor:
        """Whether the question names each fact's entity, bool [M] in the order of `memory.fact_ids`, on the CPU.

        Raises:
            InputError: the memory was made without the facts' texts.
        """
        _check_texts(memory)
        return torch.from_numpy(named_facts(memory, question))

    def scores(self, memory: KnowledgeMemory, messages: Conversation) -> torch.Tensor:
        """The prior of every fact, float32 [M] in the order of `memory.fact_ids`: what `with_prior` takes."""
        question = self.question(messages)
        lexical_M = torch.zeros(memory.num_facts, device=memory.device)
        if self.gamma:
            lexical_M[self.names_entity(memory, question).to(memory.device)] = self.gamma
        if not self.beta:
            return lexical_M
        return self.beta * self.cosines(memory, question) + lexical_M

    def similar(self, memory: KnowledgeMemory, messages: Conversation, num_facts: int) -> np.ndarray:
        """Ids of the facts that the prior ranks first, int64 [min(num_facts, M)], best first.

        Ranked by the prior, with the bare cosine in it where beta is 0; of equal facts the one that stands first in
        the memory is first. Every fact is compared, but for chunks that have an index: of those, the facts that the
        question names and the index's candidates.

        Raises:
            InputError: `num_facts` is below 1.
        """
        _check_num(num_facts)
        best = self._best(memory, messages, num_facts)
        return best.fact_ids_K[torch.sort(best.rank_K, descending=True, stable=True).indices.cpu().numpy()]

    def apply(self, memory: KnowledgeMemory, messages: Conversation, num_facts: int | None = None) -> KnowledgeMemory:
        """The memory for one request: with the question's prior, and of the `num_facts` facts ranked first only.

        Where beta and gamma are 0 no prior is set, and where nothing is to be left out either, it is the memory
        itself. A prior that the memory has already is replaced.

        Args:
            num_facts: K of `similar:K`; None, or as many as there are, keeps all facts.
        """
        if num_facts is not None:
            _check_num(num_facts)
        has_prior = bool(self.beta or self.gamma)
        if num_facts is not None and num_facts < memory.num_facts:
            best = self._best(memory, messages, num_facts)
            memory = memory.select(best.fact_ids_K)
            return memory.with_prior(best.prior_K) if has_prior else memory
        if not memory.num_facts or not has_prior:
            return memory
        return memory.with_prior(self.scores(memory, messages))

    def _best(self, memory: KnowledgeMemory, messages: Conversation, num_facts: int) -> _Best:
        """The facts that the prior ranks first, in the order of `memory.fact_ids`."""
        question = self.question(messages)
        if self.gamma:
            _check_texts(memory)
        question_P = self._embedded_for(memory, question)
        parts = []
        for view in memory.views:
            named = named_rows(view, question) if self.gamma else np.empty(0, np.int64)
            parts.append(self._best_of(view, question_P, named, num_facts))
        return _Best.joined(parts, memory.device).first(num_facts)

    def _best_of(self, view: ChunkView, question_P: torch.Tensor, named: np.ndarray, num_facts: int) -> _Best:
        # Facts that an index finds are the nearest ones, to which words can only add.
        near = near_rows(view, question_P, num_facts) if self.beta >= 0 and self.gamma >= 0 else None
        if near is None:
            rows = None if view.positions is None else view.live_positions()
            cosines_m = _view_cosines(view, question_P)
        else:
            rows = np.union1d(near, named)
            at = torch.from_numpy(rows).to(question_P.device)
            cosines_m = _cosines(view.chunk.keys_MP.index_select(0, at), question_P)
        lexical_m = torch.zeros_like(cosines_m)
        places = named if rows is None else np.searchsorted(rows, named)
        lexical_m[torch.from_numpy(places).to(lexical_m.device)] = self.gamma
        prior_m = self.beta * cosines_m + lexical_m
        rank_m = prior_m if self.beta else cosines_m + lexical_m
        if near is None and view.hidden_rows is not None:
            rank_m = rank_m.index_fill(0, view.hidden_rows, float("-inf"))
        chosen_k = _largest(rank_m, min(num_facts, view.num_live))
        host_k = chosen_k.cpu().numpy()
        fact_ids_k = view.chunk.fact_ids[host_k if rows is None else rows[host_k]]
        return _Best(fact_ids_k, prior_m[chosen_k], rank_m[chosen_k])

    def _embedded_for(self, memory: KnowledgeMemory, question: str) -> torch.Tensor:
        self._check_dim(memory)
        return self.embed(question).to(memory.device)

    def _check_dim(self, memory: KnowledgeMemory) -> None:
        dim = memory.adapter.config.dim
        if self.encoder.spec.dim != dim:
            raise EncoderMismatchError(
                f"the encoder gives {self.encoder.spec.dim} numbers, the memory's keys have {dim}",
                where=self.encoder.spec.name,
                help="give the encoder that the knowledge base was made with",
            )


@dataclass(frozen=True)
class _Best:
    """Facts ranked first, in the order in which they stand in the memory.

    Attributes:
        fact_ids_K: NumPy int64.
        prior_K, rank_K: float32; they differ where beta is 0.
    """

    fact_ids_K: np.ndarray
    prior_K: torch.Tensor
    rank_K: torch.Tensor

    @classmethod
    def joined(cls, parts: Sequence[_Best], device: torch.device) -> _Best:
        none = torch.zeros(0, device=device)
        return cls(
            np.concatenate([np.empty(0, np.int64), *(part.fact_ids_K for part in parts)]),
            torch.cat([none, *(part.prior_K for part in parts)]),
            torch.cat([none, *(part.rank_K for part in parts)]),
        )

    def first(self, num: int) -> _Best:
        chosen_k = _largest(self.rank_K, num)
        return _Best(self.fact_ids_K[chosen_k.cpu().numpy()], self.prior_K[chosen_k], self.rank_K[chosen_k])


def _view_cosines(view: ChunkView, question_P: torch.Tensor) -> torch.Tensor:
    """Cosines of a view's rows, hidden ones too, float32 [num_rows]."""
    block = BLOCK_ROWS["cpu" if question_P.device.type == "cpu" else "cuda"]
    cosines_M = torch.empty(view.num_rows, device=question_P.device)
    for start in range(0, view.num_rows, block):
        keys_mP = view.rows(view.chunk.keys_MP, 0, start, start + block)
        cosines_M[start : start + block] = _cosines(keys_mP, question_P)
    return cosines_M


def _cosines(keys_mP: torch.Tensor, question_P: torch.Tensor) -> torch.Tensor:
    keys_mP = keys_mP.float()
    norms_m = torch.linalg.vector_norm(keys_mP, dim=1)
    return torch.where(norms_m > 0, keys_mP @ question_P / norms_m, 0.0)


def _check_num(num_facts: int) -> None:
    if num_facts < 1:
        raise InputError(f"cannot keep {num_facts} facts", where="similar", help="keep at least 1")


def _check_texts(memory: KnowledgeMemory) -> None:
    if not memory.has_texts and memory.num_facts:
        raise InputError(
            "the prior looks for entities in the question, but the memory has no texts",
            where="prior_lexical",
            help="give facts= when loading the memory, or set prior_lexical to 0",
        )


def _largest(scores_M: torch.Tensor, num: int) -> torch.Tensor:
    """Positions of the largest scores, ascending; of equal ones those that come first."""
    if num >= len(scores_M):
        return torch.arange(len(scores_M), device=scores_M.device)
    least = scores_M.topk(num).values[-1]
    above = (scores_M > least).nonzero().squeeze(1)
    ties = (scores_M == least).nonzero().squeeze(1)[: num - len(above)]
    return torch.cat([above, ties]).sort().values
