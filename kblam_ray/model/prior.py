"""The question prior: the encoder that made the keys reads the question too, and says which facts it is near.

Added to the KB logits of every layer and token, it is what the words of the question tell; attention adds what the
sentence so far tells. Its hard form keeps only the facts that it ranks first. Shape legend: M facts, P encoder dim.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.encoders.base import Encoder
from kblam_ray.errors import EncoderError, EncoderMismatchError, InputError
from kblam_ray.model.mentions import named_facts

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
        dim = memory.adapter.config.dim
        if self.encoder.spec.dim != dim:
            raise EncoderMismatchError(
                f"the encoder gives {self.encoder.spec.dim} numbers, the memory's keys have {dim}",
                where=self.encoder.spec.name,
                help="give the encoder that the knowledge base was made with",
            )
        if not memory.num_facts:
            return torch.zeros(0, device=memory.device)
        question_P = self.embed(question).to(memory.device)
        block = BLOCK_ROWS["cpu" if memory.device.type == "cpu" else "cuda"]
        parts = []
        for view in memory.views:
            cosines_M = torch.empty(view.num_rows, device=memory.device)
            for start in range(0, view.num_rows, block):
                keys_mP = view.rows(view.chunk.keys_MP, 0, start, start + block).float()
                norms_m = torch.linalg.vector_norm(keys_mP, dim=1)
                cosines_M[start : start + block] = torch.where(norms_m > 0, keys_mP @ question_P / norms_m, 0.0)
            parts.append(cosines_M if view.positions is not None else view.live_rows(cosines_M))
        return torch.cat(parts)  # type: ignore[arg-type]

    def names_entity(self, memory: KnowledgeMemory, question: str) -> torch.Tensor:
        """Whether the question names each fact's entity, bool [M] in the order of `memory.fact_ids`, on the CPU.

        Raises:
            InputError: the memory was made without the facts' texts.
        """
        if not memory.has_texts and memory.num_facts:
            raise InputError(
                "the prior looks for entities in the question, but the memory has no texts",
                where="prior_lexical",
                help="give facts= when loading the memory, or set prior_lexical to 0",
            )
        return torch.from_numpy(named_facts(memory, question))

    def scores(self, memory: KnowledgeMemory, messages: Conversation) -> torch.Tensor:
        """The prior of every fact, float32 [M] in the order of `memory.fact_ids`: what `with_prior` takes."""
        return self._prior_and_rank(memory, messages, needs_rank=False)[0]

    def similar(self, memory: KnowledgeMemory, messages: Conversation, num_facts: int) -> np.ndarray:
        """Ids of the facts that the prior ranks first, int64 [min(num_facts, M)], best first.

        Exact: every fact is compared. Ranked by the prior, with the bare cosine in it where beta is 0; of equal facts
        the one that stands first in the memory is first.

        Raises:
            InputError: `num_facts` is below 1.
        """
        _check_num(num_facts)
        _, rank_M = self._prior_and_rank(memory, messages, needs_rank=True)
        return memory.fact_ids[_largest(rank_M, num_facts).cpu().numpy()]

    def apply(self, memory: KnowledgeMemory, messages: Conversation, num_facts: int | None = None) -> KnowledgeMemory:
        """The memory for one request: with the question's prior, and of the `num_facts` facts ranked first only.

        Where beta and gamma are 0 no prior is set, and where nothing is to be left out either, it is the memory
        itself. A prior that the memory has already is replaced.

        Args:
            num_facts: K of `similar:K`; None, or as many as there are, keeps all facts.
        """
        if num_facts is not None:
            _check_num(num_facts)
        is_selecting = num_facts is not None and num_facts < memory.num_facts
        has_prior = bool(self.beta or self.gamma)
        if not memory.num_facts or not (is_selecting or has_prior):
            return memory
        prior_M, rank_M = self._prior_and_rank(memory, messages, needs_rank=is_selecting)
        fact_ids = memory.fact_ids
        if has_prior:
            memory = memory.with_prior(prior_M)
        if is_selecting:
            memory = memory.select(fact_ids[_largest(rank_M, num_facts or 0).cpu().numpy()])
        return memory

    def _prior_and_rank(
        self, memory: KnowledgeMemory, messages: Conversation, *, needs_rank: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        question = self.question(messages)
        lexical_M = torch.zeros(memory.num_facts, device=memory.device)
        if self.gamma:
            lexical_M[self.names_entity(memory, question).to(memory.device)] = self.gamma
        if not self.beta and not needs_rank:
            return lexical_M, lexical_M
        cosines_M = self.cosines(memory, question)
        prior_M = self.beta * cosines_M + lexical_M
        return prior_M, prior_M if self.beta else cosines_M + lexical_M


def _check_num(num_facts: int) -> None:
    if num_facts < 1:
        raise InputError(f"cannot keep {num_facts} facts", where="similar", help="keep at least 1")


def _largest(scores_M: torch.Tensor, num: int) -> torch.Tensor:
    """Positions of the largest scores, largest first; of equal ones those that come first."""
    if num >= len(scores_M):
        return torch.sort(scores_M, descending=True, stable=True).indices
    least = scores_M.topk(num).values[-1]
    above = (scores_M > least).nonzero().squeeze(1)
    ties = (scores_M == least).nonzero().squeeze(1)[: num - len(above)]
    chosen = torch.cat([above, ties])
    return chosen[torch.sort(scores_M[chosen], descending=True, stable=True).indices]
