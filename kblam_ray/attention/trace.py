"""Which facts a model attended to: the share of each fact, per token and layer or summed, without tokens x facts.

Shape legend: B batch, T tokens, A answer tokens, M facts, L KB layers, N query heads.

In one softmax over [facts | text], fact m has at token t and head n the share `w_tn p_tnm`: w is the weight of the
facts beside the text, p the softmax over the facts alone. All shares and the text's sum to 1. The shares of a forward
pass are found in a second look at each block of facts, once the log-sum-exp is known: what is kept is the n largest per
token, or one number per fact.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kblam_ray.attention.attach import Attachment
from kblam_ray.attention.batch import Attended, AttendedGroup, Knowledge, Recorder
from kblam_ray.attention.memory import ChunkView, KnowledgeMemory
from kblam_ray.attention.softmax import Facts, shares
from kblam_ray.errors import InputError


@dataclass(frozen=True)
class Trace:
    """The facts that answer tokens attended to most, largest share first.

    Attributes:
        layers: the L KB layers traced, ascending.
        fact_ids: int64 [B, L, A, top_n]; 0 where `shares` is 0 because there are not so many facts.
        shares: float32 [B, L, A, top_n], each fact's share of the attention, mean over the heads.
        kb_shares: float32 [B, L, A], the share of all facts together; 1 minus it is the text's.
    """

    layers: tuple[int, ...]
    fact_ids: torch.Tensor
    shares: torch.Tensor
    kb_shares: torch.Tensor


@torch.no_grad()
def trace(
    attachment: Attachment,
    input_ids: torch.Tensor,
    knowledge: Knowledge,
    answer_start: int | Sequence[int],
    top_n: int = 5,
    *,
    layers: Sequence[int] | None = None,
    attention_mask: torch.Tensor | None = None,
) -> Trace:
    """The facts attended to while each answer token was written.

    The token at position t is written by the attention at position t - 1, so the tokens looked at are those from
    `answer_start - 1` to the one before the last.

    Args:
        input_ids: prompt and answer, int64 [B, T].
        knowledge: one memory for all rows, or one (or None) per row.
        answer_start: where the answer begins, in every row or per row; rows with shorter answers end with zeros.
        top_n: facts per token.
        layers: KB layers to trace; the adapter's retrieval layers by default.

    Raises:
        InputError: an answer that begins before position 1 or after the end, no facts asked for, not a KB layer.
    """
    if top_n < 1:
        raise InputError(f"the {top_n} largest shares", where="top_n", help="ask for 1 or more")
    batch, length = input_ids.shape
    positions = _answer_positions(answer_start, batch, length)
    layers = traced_layers(attachment, layers)
    recorder = _TopN(layers, positions, length, top_n)
    run_recorded(attachment, input_ids, knowledge, recorder, attention_mask)
    return recorder.trace(batch)


@torch.no_grad()
def mean_shares(
    attachment: Attachment,
    input_ids: torch.Tensor,
    memory: KnowledgeMemory,
    answer_start: int,
    *,
    layers: Sequence[int] | None = None,
) -> torch.Tensor:
    """Each fact's share of the attention, mean over answer tokens, layers and heads: a citation's score.

    Args:
        input_ids: prompt and answer of one conversation, int64 [1, T].
        layers: default the adapter's retrieval layers.

    Returns:
        float32 [M] in the order of `memory.fact_ids`; they sum to the share of all facts.
    """
    positions = _answer_positions(answer_start, 1, input_ids.shape[1])
    return _mean(attachment, input_ids, memory, positions, layers, with_text=True)


@torch.no_grad()
def retrieval_scores(
    attachment: Attachment,
    input_ids: torch.Tensor,
    memory: KnowledgeMemory,
    *,
    layers: Sequence[int] | None = None,
) -> torch.Tensor:
    """How strongly the last prompt token attends to each fact, beside the other facts only: what ranks retrieval.

    Args:
        input_ids: a prompt without padding, int64 [1, T].
        layers: default the adapter's retrieval layers.

    Returns:
        float32 [M] in the order of `memory.fact_ids`: the softmax over the facts, mean over layers and heads; the
        memory's prior takes part where it has one.
    """
    return _mean(attachment, input_ids, memory, [[input_ids.shape[1] - 1]], layers, with_text=False)


def _mean(
    attachment: Attachment,
    input_ids: torch.Tensor,
    memory: KnowledgeMemory,
    positions: list[list[int]],
    layers: Sequence[int] | None,
    *,
    with_text: bool,
) -> torch.Tensor:
    if len(input_ids) != 1:
        raise InputError(f"a batch of {len(input_ids)} rows", where="input_ids", help="give one row: [1, T]")
    layers = traced_layers(attachment, layers)
    recorder = _Sum(layers, positions[0], memory, with_text=with_text)
    if memory.num_facts:
        run_recorded(attachment, input_ids, memory, recorder, None)
    return recorder.mean()


def run_recorded(
    attachment: Attachment,
    input_ids: torch.Tensor,
    knowledge: Knowledge,
    recorder: Recorder,
    attention_mask: torch.Tensor | None = None,
    *,
    cache: Any = None,
    keep_cache: bool = False,
) -> Any:
    """One forward pass that a recorder watches; gives the base model's output, with as few logits as it can make.

    Args:
        cache: the base model's cache of the tokens before `input_ids`.
        keep_cache: make and return one, as `past_key_values` of the output.
    """
    model = attachment.base_model
    # Logits are not looked at: of a long prompt and a large vocabulary they would be most of the memory.
    least = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with attachment.using(knowledge, recorder):
        return model(
            input_ids.to(model.device),
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=keep_cache,
            **least,
        )


def traced_layers(attachment: Attachment, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers to look at, ascending; by default the adapter's retrieval layers."""
    config = attachment.adapter.config
    chosen = tuple(sorted(config.retrieval_layers if layers is None else layers))
    if unknown := set(chosen) - set(config.layers):
        raise InputError(
            f"{sorted(unknown)} are not KB layers", where="layers", help=f"choose among {list(config.layers)}"
        )
    return chosen


def _answer_positions(answer_start: int | Sequence[int], batch: int, length: int) -> list[list[int]]:
    starts = [answer_start] * batch if isinstance(answer_start, int) else list(answer_start)
    if len(starts) != batch or not all(1 <= start <= length for start in starts):
        raise InputError(
            f"answers that begin at {starts} in {batch} rows of {length} tokens",
            where="answer_start",
            help="give positions from 1 to the length, one for all rows or one per row",
        )
    return [list(range(start - 1, length - 1)) for start in starts]


def mean_over_heads(shares_ATm: torch.Tensor, weight_TN: torch.Tensor | None) -> torch.Tensor:
    """Mean over heads of w p [t, m], or of p without a weight; a shared score has one p for all heads."""
    if weight_TN is None:
        return shares_ATm.mean(0)
    if len(shares_ATm) == 1:
        return shares_ATm[0] * weight_TN.mean(1, keepdim=True)
    return torch.einsum("ntm,tn->tm", shares_ATm, weight_TN.to(shares_ATm.dtype)) / len(shares_ATm)


class Looked:
    """The part of one group's attention at the tokens that are looked at.

    Attributes:
        tokens: those of them that are in the group, int64, among all of the batch.
        lse_At: log-sum-exp of their KB logits, before the shift by the number of facts.
    """

    def __init__(self, part: AttendedGroup, wanted_T: torch.Tensor) -> None:
        group = part.group
        if group.tokens is None:
            self.tokens = self.places = wanted_T
        else:
            is_wanted = torch.isin(group.tokens, wanted_T)
            self.places = is_wanted.nonzero().squeeze(1)
            self.tokens = group.tokens[self.places]
        form = part.form
        self.query_AtD = form.query_ATD[:, self.places]
        self.bias_At = None if form.bias_AT is None else form.bias_AT[:, self.places]
        self.lse_At = part.lse_AT[:, self.places]
        self._part = part

    def facts(self) -> Iterator[tuple[ChunkView, Facts]]:
        """Per view: the view, and its facts as the tokens' attention scored them."""
        for view, log_weights in self._part.group.views():
            taken = None if log_weights is None else log_weights.take(self.places)
            yield view, self._part.form.facts(view, taken)

    def views(self) -> Iterator[tuple[ChunkView, Iterator[tuple[slice, torch.Tensor]]]]:
        """Per view: the view, and its facts' shares of the softmax over facts in blocks (rows, [A, t, m])."""
        for view, facts in self.facts():
            yield view, shares(self.query_AtD, self.bias_At, facts, self.lse_At)


class _Sum:
    """Adds up every fact's share over tokens and layers: one number per fact."""

    def __init__(
        self, layers: tuple[int, ...], positions: list[int], memory: KnowledgeMemory, *, with_text: bool
    ) -> None:
        self._layers, self._positions, self._memory, self._with_text = layers, positions, memory, with_text
        self._sums = [torch.zeros(view.num_rows, device=memory.device) for view in memory.views]

    def record(self, layer: int, attended: Attended, weight_TN: torch.Tensor) -> None:
        if layer not in self._layers or not self._positions:
            return
        wanted_T = torch.tensor(self._positions, device=weight_TN.device)
        for part in attended.groups:
            looked = Looked(part, wanted_T)
            weight_tN = weight_TN[looked.tokens] if self._with_text else None
            for sum_M, (_, blocks) in zip(self._sums, looked.views(), strict=True):
                for rows, shares_Atm in blocks:
                    sum_M[rows] += mean_over_heads(shares_Atm, weight_tN).sum(0)

    def mean(self) -> torch.Tensor:
        live = [
            sum_M if view.positions is not None else view.live_rows(sum_M)
            for sum_M, view in zip(self._sums, self._memory.views, strict=True)
        ]
        total_M = torch.cat(live) if live else torch.zeros(0)
        return total_M / max(1, len(self._layers) * len(self._positions))


class _TopN:
    """Keeps the facts with the largest shares per token and layer."""

    def __init__(self, layers: tuple[int, ...], positions: list[list[int]], length: int, top_n: int) -> None:
        self._layers, self._positions, self._top_n = layers, positions, top_n
        self._tokens = [row * length + position for row, places in enumerate(positions) for position in places]
        self._best: dict[tuple[int, int], tuple[float, torch.Tensor, torch.Tensor]] = {}

    def record(self, layer: int, attended: Attended, weight_TN: torch.Tensor) -> None:
        if layer not in self._layers:
            return
        wanted_T = torch.tensor(self._tokens, dtype=torch.int64, device=weight_TN.device)
        for part in attended.groups:
            looked = Looked(part, wanted_T)
            if not len(looked.tokens):
                continue
            weight_tN = weight_TN[looked.tokens]
            best_tn, ids_tn = self._largest(looked, weight_tN)
            kb_shares = weight_tN.mean(1).tolist()
            for place, token in enumerate(looked.tokens.tolist()):
                self._best[layer, token] = (kb_shares[place], best_tn[place].cpu(), ids_tn[place].cpu())

    def _largest(self, looked: Looked, weight_tN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        best_tn = weight_tN.new_zeros(len(weight_tN), 0)
        ids_tn = torch.zeros(len(weight_tN), 0, dtype=torch.int64, device=weight_tN.device)
        for view, blocks in looked.views():
            fact_ids_M = view.chunk.fact_ids if view.positions is None else view.fact_ids
            for rows, shares_Atm in blocks:
                share_tm = mean_over_heads(shares_Atm, weight_tN)
                found = share_tm.topk(min(self._top_n, share_tm.shape[1]), dim=1)
                ids = torch.tensor(fact_ids_M[rows])[found.indices.cpu()].to(ids_tn.device)
                best_tn, ids_tn = torch.cat([best_tn, found.values], 1), torch.cat([ids_tn, ids], 1)
                kept = best_tn.topk(min(self._top_n, best_tn.shape[1]), dim=1)
                best_tn, ids_tn = kept.values, ids_tn.gather(1, kept.indices)
        return best_tn, ids_tn

    def trace(self, batch: int) -> Trace:
        most = max(len(places) for places in self._positions)
        shape = (batch, len(self._layers), most)
        fact_ids = torch.zeros(*shape, self._top_n, dtype=torch.int64)
        best, kb_shares = torch.zeros(*shape, self._top_n), torch.zeros(shape)
        token = iter(self._tokens)
        for row, places in enumerate(self._positions):
            for answer_token in range(len(places)):
                at = next(token)
                for place, layer in enumerate(self._layers):
                    if (layer, at) not in self._best:
                        continue
                    kb_share, best_n, ids_n = self._best[layer, at]
                    kb_shares[row, place, answer_token] = kb_share
                    # A hidden fact has the share 0: it is no more among the answers than one that does not exist.
                    best[row, place, answer_token, : len(best_n)] = best_n
                    fact_ids[row, place, answer_token, : len(ids_n)] = torch.where(best_n > 0, ids_n, 0)
        return Trace(self._layers, fact_ids, best, kb_shares)
