"""What one prompt attends to: the evidence for each fact at its end, and each fact's share of the answer that follows.

Shape legend: T tokens, A answer tokens, M facts, N query heads; in the softmax's code A rows of queries per token.

Both come from one run over the conversation. Where the answer depends on the evidence, the prompt runs first and the
answer continues from its cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kblam_ray.attention import softmax
from kblam_ray.attention.attach import Attachment
from kblam_ray.attention.batch import Attended
from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.attention.projections import exact_dtype
from kblam_ray.attention.softmax import NO_FACTS
from kblam_ray.attention.trace import Looked, mean_over_heads, run_recorded, traced_layers
from kblam_ray.errors import InputError


@dataclass(frozen=True)
class Evidence:
    """What the last prompt token's attention says of each fact, means over retrieval layers and heads.

    Attributes:
        scores_M: float32 [M], the retrieval scores: the softmax over the facts, with the memory's prior.
        logits_M: float32 [M], the scores before the softmax, without prior and without what is the same for all facts
            (gate, `log C - log M`); -inf for a fact that the prior hides.
        kb_share: the weight of all facts beside the text, from 0 to 1.
    """

    scores_M: torch.Tensor
    logits_M: torch.Tensor
    kb_share: float


def retrieval_evidence(
    attachment: Attachment,
    input_ids: torch.Tensor,
    memory: KnowledgeMemory,
    *,
    layers: Sequence[int] | None = None,
) -> Evidence:
    """The evidence for each fact at the end of a prompt, in one forward pass.

    Args:
        input_ids: a prompt without padding, int64 [1, T].
        layers: default the adapter's retrieval layers.
    """
    return PromptTrace(attachment, input_ids, memory, layers=layers, keep_cache=False).evidence


def evidence_and_shares(
    attachment: Attachment,
    input_ids: torch.Tensor,
    memory: KnowledgeMemory,
    answer_start: int,
    *,
    layers: Sequence[int] | None = None,
) -> tuple[Evidence, torch.Tensor]:
    """The evidence at the end of the prompt and each fact's share of an answer that is known, in one forward pass.

    Args:
        input_ids: prompt and answer of one conversation, int64 [1, T].
        answer_start: where the answer begins.

    Returns:
        The evidence, and shares as `trace.mean_shares` gives them, float32 [M].
    """
    if not 1 <= answer_start <= input_ids.shape[1]:
        raise InputError(
            f"an answer that begins at {answer_start} of {input_ids.shape[1]} tokens",
            where="answer_start",
            help="give a position from 1 to the length",
        )
    traced = PromptTrace(
        attachment, input_ids[:, :answer_start], memory, input_ids[:, answer_start:], layers=layers, keep_cache=False
    )
    return traced.evidence, traced.shares


class PromptTrace:
    """One conversation's attention to one memory: the prompt, and the answer once it is known.

    Attributes:
        evidence: for each fact, at the end of the prompt.
        shares: float32 [M], each fact's share of the attention, mean over the tokens of the answer given so far.

    Args:
        prompt_ids: a prompt without padding, int64 [1, T].
        answer_ids: int64 [1, A], where it is known already.
        layers: default the adapter's retrieval layers.
        keep_cache: `answer` will be called.
    """

    @torch.no_grad()
    def __init__(
        self,
        attachment: Attachment,
        prompt_ids: torch.Tensor,
        memory: KnowledgeMemory,
        answer_ids: torch.Tensor | None = None,
        *,
        layers: Sequence[int] | None = None,
        keep_cache: bool = True,
    ) -> None:
        if len(prompt_ids) != 1 or not prompt_ids.shape[1]:
            raise InputError(
                f"a prompt of shape {list(prompt_ids.shape)}", where="input_ids", help="give one row: [1, T]"
            )
        self._attachment, self._memory, self._prompt_ids = attachment, memory, prompt_ids
        self._layers = traced_layers(attachment, layers)
        self._cache: Any = None
        if answer_ids is None:
            answer_ids = prompt_ids[:, :0]
        self._recorder = recorder = _Evidence(self._layers, memory)
        length, num_answered = prompt_ids.shape[1], answer_ids.shape[1]
        recorder.prompt_end = length - 1
        # The token before the answer attends for its first one: by itself while the answer's length is open.
        recorder.first_shares = keep_cache
        recorder.answer = range(length if keep_cache else length - 1, length + num_answered - 1)
        if memory.num_facts:
            output = run_recorded(
                attachment, torch.cat([prompt_ids, answer_ids], 1), memory, recorder, keep_cache=keep_cache
            )
            self._cache = getattr(output, "past_key_values", None)
        self.evidence = recorder.evidence()
        self.shares = recorder.shares(num_answered)

    @torch.no_grad()
    def answer(self, answer_ids: torch.Tensor) -> torch.Tensor:
        """Each fact's share of an answer that follows the prompt, float32 [M]: what `trace.mean_shares` gives.

        Args:
            answer_ids: int64 [1, A]. Given once; the trace's cache is used up.
        """
        recorder, num_tokens = self._recorder, answer_ids.shape[1]
        recorder.prompt_end = None
        # The last token attends for a token that is not written.
        if num_tokens > 1 and self._memory.num_facts:
            if self._cache is None:  # a base model that keeps none
                length = self._prompt_ids.shape[1]
                recorder.answer = range(length, length + num_tokens - 1)
                ids = torch.cat([self._prompt_ids.to(answer_ids.device), answer_ids], 1)
            else:
                recorder.answer, ids = range(num_tokens - 1), answer_ids[:, :-1]
            run_recorded(
                self._attachment, ids, self._memory, recorder, cache=self._cache, keep_cache=self._cache is not None
            )
        self._cache = None
        self.shares = recorder.shares(num_tokens)
        return self.shares


class _Evidence:
    """Adds up scores and logits of every fact at the end of the prompt, and shares over the tokens of the answer.

    Attributes:
        prompt_end: where the last prompt token is in the next forward pass; None: not in it.
        first_shares: that token's shares are wanted, too.
        answer: where further tokens are whose shares are wanted.
    """

    def __init__(self, layers: tuple[int, ...], memory: KnowledgeMemory) -> None:
        self._layers, self._memory = layers, memory
        self.prompt_end: int | None = None
        self.first_shares = False
        self.answer = range(0)
        # Per view: retrieval scores, logits, and shares of the token before the answer and of the others.
        self._sums = [torch.zeros(4, view.num_rows, device=memory.device) for view in memory.views]
        self._kb_share = 0.0

    def record(self, layer: int, attended: Attended, weight_TN: torch.Tensor) -> None:
        if layer not in self._layers:
            return
        device = weight_TN.device
        for part in attended.groups:
            if self.prompt_end is not None:
                end_1 = torch.tensor([self.prompt_end], device=device)
                self._record_end(Looked(part, end_1), weight_TN[end_1])
            if len(self.answer):
                looked = Looked(part, torch.tensor(list(self.answer), device=device))
                weight_tN = weight_TN[looked.tokens]
                for sums, (_, blocks) in zip(self._sums, looked.views(), strict=True):
                    for rows, shares_Atm in blocks:
                        sums[3, rows] += mean_over_heads(shares_Atm, weight_tN).sum(0)

    def _record_end(self, looked: Looked, weight_1N: torch.Tensor) -> None:
        self._kb_share += float(weight_1N.mean())
        lse_A1 = looked.lse_At.masked_fill(looked.lse_At == NO_FACTS, 0.0)
        budgets = softmax.SCORES_PER_BLOCK
        budget = budgets.get(looked.query_AtD.device.type, budgets["cuda"])
        # Not larger blocks for one token: the form may be one that makes a block's keys, chosen for all the tokens.
        num_facts = max(1, budget // max(len(lse_A1), softmax.ROWS_PER_BLOCK))
        for sums, (_, facts) in zip(self._sums, looked.facts(), strict=True):
            scale_M = facts.scale_M()
            for start in range(0, facts.num_rows, num_facts):
                rows = slice(start, min(start + num_facts, facts.num_rows))
                keys, _ = facts.block(rows)
                logits_Am = torch.matmul(looked.query_AtD, keys.transpose(-1, -2)).squeeze(1)
                logits_Am = logits_Am.to(exact_dtype(logits_Am.dtype))
                if looked.bias_At is not None:
                    logits_Am = logits_Am + looked.bias_At.to(logits_Am.dtype)
                if scale_M is not None:
                    logits_Am = logits_Am * scale_M[rows].to(logits_Am.dtype)
                log_weights = facts.log_weights(rows, slice(0, 1))
                weighted_Am = logits_Am if log_weights is None else logits_Am + log_weights
                share_A1m = torch.exp(weighted_Am - lse_A1)[:, None]
                sums[0, rows] += mean_over_heads(share_A1m, None)[0]
                sums[1, rows] += logits_Am.mean(0).masked_fill((weighted_Am == NO_FACTS).all(0), NO_FACTS)
                if self.first_shares:
                    sums[2, rows] += mean_over_heads(share_A1m, weight_1N)[0]

    def evidence(self) -> Evidence:
        means_4M = self._live() / max(1, len(self._layers))
        return Evidence(means_4M[0].clone(), means_4M[1].clone(), self._kb_share / max(1, len(self._layers)))

    def shares(self, num_tokens: int) -> torch.Tensor:
        live_4M = self._live()
        if not num_tokens:
            return torch.zeros_like(live_4M[0])
        return (live_4M[2] + live_4M[3]) / max(1, len(self._layers) * num_tokens)

    def _live(self) -> torch.Tensor:
        live = [
            sums if view.positions is not None else view.live_rows(sums, 1)
            for sums, view in zip(self._sums, self._memory.views, strict=True)
        ]
        return torch.cat(live, 1) if live else torch.zeros(4, 0, device=self._memory.device)
