"""Passes of the frozen model over questions with their answers, into statistics or into a few held-out rows.

Shape legend: B batch, T tokens, n rows, X hidden size, P encoder dim, N query heads, K key/value heads, H head dim.

Questions are batched within fixed blocks, so that the batches, and with them the rounding of the passes, do not depend
on who works on which blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from kblam_ray.facts.questions import Question, QuestionKind, QuestionMaker
from kblam_ray.model.chat import ChatTemplate
from kblam_ray.table.embedded import EmbeddedFacts
from kblam_ray.training.closed_form.positions import COPY, OTHER, PARTS, VALUE, AskedTokens, asked_tokens
from kblam_ray.training.closed_form.statistics import Statistics, with_one
from kblam_ray.training.closed_form.watching import WatchedModel

GONE = len(PARTS)
"""The part of tokens that are not looked at."""

KEPT_PER_QUESTION = 2
"""Held-out rows kept of a question's COPY, VALUE and OTHER tokens, each."""


def shares_of(
    maker: QuestionMaker, wanted: Mapping[QuestionKind, float] | None, default: Mapping[QuestionKind, float]
) -> dict[QuestionKind, float]:
    """The mix asked for; without one the default without the kinds that the table does not allow."""
    if wanted is not None:
        return dict(wanted)
    return {kind: default[kind] for kind in maker.possible_kinds() if default.get(kind)}


@dataclass(frozen=True)
class Passes:
    """What is needed to run the model over questions by number; it can be pickled.

    Attributes:
        facts: what is asked about; also the meaning of fact numbers.
        key_mean_P: float64 [P], taken off the keys.
        layers: decoder layers looked at.
        mix: share of each kind of question.
    """

    chat: ChatTemplate
    facts: EmbeddedFacts
    key_mean_P: np.ndarray
    layers: tuple[int, ...]
    mix: Mapping[QuestionKind, float]
    refusal: str
    seed: int
    block_questions: int
    batch_tokens: int

    def num_blocks(self, num_questions: int) -> int:
        return -(-num_questions // self.block_questions)

    def statistics(self, model: PreTrainedModel, blocks: Sequence[int], num_questions: int) -> Statistics:
        """Of the questions of some blocks out of `num_questions`."""
        watched = WatchedModel(model, self.layers)
        total = _Adder(self, Statistics())
        for block in blocks:
            stop = min((block + 1) * self.block_questions, num_questions)
            for _, asked in self._run(watched, block * self.block_questions, stop, total):
                total.statistics.num_questions += 1
                total.statistics.num_unreadable += asked is None
                total.statistics.num_tokens += 0 if asked is None else len(asked.input_ids)
        return total.statistics

    def rows(self, model: PreTrainedModel, num_questions: int) -> HeldOutRows:
        """Rows of the first questions, as they are."""
        keeper = _Keeper(HeldOutRows())
        watched = WatchedModel(model, self.layers)
        for start in range(0, num_questions, self.block_questions):
            stop = min(start + self.block_questions, num_questions)
            for question, asked in self._run(watched, start, stop, keeper):
                if asked is not None:
                    keeper.rows.asked.append((question, asked))
        return keeper.rows

    def _run(
        self, watched: WatchedModel, start: int, stop: int, consumer: _Adder | _Keeper
    ) -> Iterator[tuple[Question, AskedTokens | None]]:
        maker = QuestionMaker(self.facts.facts, self.seed, refusal=self.refusal)
        found = []
        for question in maker.questions(start, stop, self.mix):
            asked = asked_tokens(self.chat, question, self.facts.facts)
            if asked is not None:
                found.append(asked)
            yield question, asked
        for batch in _batches(found, self.batch_tokens):
            input_ids_BT, mask_BT = padded(batch, self.chat)
            consumer.begin(batch, mask_BT, watched.device)
            watched.run(input_ids_BT, mask_BT, consumer)


def _batches(asked: Sequence[AskedTokens], batch_tokens: int) -> Iterator[list[AskedTokens]]:
    batch: list[AskedTokens] = []
    for one in sorted(asked, key=lambda one: len(one.input_ids)):
        # Ascending: the new one is the longest, to which the others are padded.
        if batch and len(one.input_ids) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def padded(batch: Sequence[AskedTokens], chat: ChatTemplate) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T], padded on the right, and the attention mask [B, T]."""
    length = max(len(one.input_ids) for one in batch)
    pad = chat.tokenizer.pad_token_id or 0
    ids_BT = torch.full((len(batch), length), pad)
    mask_BT = torch.zeros(len(batch), length, dtype=torch.int64)
    for row, one in enumerate(batch):
        ids_BT[row, : len(one.input_ids)] = torch.tensor(one.input_ids)
        mask_BT[row, : len(one.input_ids)] = 1
    return ids_BT, mask_BT


@dataclass
class _Places:
    """Some tokens of a batch, flattened over it, and the fact that each wants."""

    tokens: torch.Tensor
    facts: np.ndarray


def _places_by_part(batch: Sequence[AskedTokens], length: int, device: torch.device) -> dict[int, _Places]:
    tokens: dict[int, list[int]] = {part: [] for part in range(len(PARTS))}
    facts: dict[int, list[int]] = {part: [] for part in range(len(PARTS))}
    for row, one in enumerate(batch):
        # The last token writes nothing.
        for at, part in enumerate(one.parts[:-1]):
            if part != GONE:
                tokens[part].append(row * length + at)
                facts[part].append(one.facts[at])
    return {
        part: _Places(torch.tensor(tokens[part], device=device), np.array(facts[part], np.int64))
        for part in tokens
        if tokens[part]
    }


class _Adder:
    """Adds the products of a pass to the statistics, layer by layer."""

    def __init__(self, passes: Passes, statistics: Statistics) -> None:
        self.statistics, self._passes = statistics, passes

    def begin(self, batch: Sequence[AskedTokens], mask_BT: torch.Tensor, device: torch.device) -> None:
        facts, sums = self._passes.facts, self.statistics.sums
        self._length = mask_BT.shape[1]
        self._places = _places_by_part(batch, self._length, device)
        self._keys: dict[int, torch.Tensor] = {}
        for part, places in self._places.items():
            if part == OTHER:
                continue
            keys_nP = np.asarray(facts.keys_MP[places.facts], np.float64) - self._passes.key_mean_P
            self._keys[part] = torch.from_numpy(keys_nP).to(device)
            ones_nP = with_one(self._keys[part])
            sums.add_product(("key_square", part), ones_nP, ones_nP)
        self._values = [(row, value) for row, one in enumerate(batch) for value in one.values]
        if self._values:
            numbers = np.array([value.fact for _, value in self._values])
            embeddings_nP = torch.from_numpy(np.asarray(facts.values_MP[numbers], np.float64)).to(device)
            self._embeddings_nP = with_one(embeddings_nP)
            sums.add_product(("value_square",), self._embeddings_nP, self._embeddings_nP)

    def take(self, layer: int, hidden_BTX: torch.Tensor, value_BKTH: torch.Tensor, lse_BNT: torch.Tensor) -> None:
        sums = self.statistics.sums
        hidden_TX, lse_TN = hidden_BTX.flatten(0, 1), lse_BNT.transpose(1, 2).flatten(0, 1)
        for part, places in self._places.items():
            hidden_nX = with_one(hidden_TX[places.tokens])
            sums.add_product(("hidden", layer, part), hidden_nX, hidden_nX)
            sums.add_product(("log_sum_exp", layer, part), hidden_nX, lse_TN[places.tokens].double())
            if part != OTHER:
                sums.add_product(("keys", layer, part), hidden_nX, self._keys[part])
        if self._values:
            mean_nV, first_nV = value_rows(value_BKTH, self._values)
            sums.add_product(("values", layer), self._embeddings_nP, mean_nV)
            sums.add_product(("first_values", layer), self._embeddings_nP, first_nV)


def value_rows(value_BKTH: torch.Tensor, values: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's value vectors of stated values: mean over each value's tokens, and its first token's; [n, K*H]."""
    value_BTV = value_BKTH.transpose(1, 2).flatten(2)
    mean_nV = torch.stack([value_BTV[row, list(value.tokens)].double().mean(0) for row, value in values])
    first_nV = torch.stack([value_BTV[row, value.tokens[0]].double() for row, value in values])
    return mean_nV, first_nV


@dataclass
class HeldOutRows:
    """Hidden states of held-out questions, few enough to be kept.

    Attributes:
        asked: the questions and their tokens.
        hidden: by (layer, part), float32 [n, X].
        log_sum_exp: by (layer, part), float32 [n, N].
        facts: by part, the n facts wanted.
        values: by layer, (mean, first) value vectors of stated values, float64 [n, V].
        stated: the n facts stated.
    """

    asked: list[tuple[Question, AskedTokens]] = field(default_factory=list)
    hidden: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    log_sum_exp: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    facts: dict[int, np.ndarray] = field(default_factory=dict)
    values: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    stated: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


class _Keeper:
    """Keeps the rows of a pass: all PROMPT tokens, and a few of each question's others."""

    def __init__(self, rows: HeldOutRows) -> None:
        self.rows = rows

    def begin(self, batch: Sequence[AskedTokens], mask_BT: torch.Tensor, device: torch.device) -> None:
        self._places = _places_by_part([_thinned(one) for one in batch], mask_BT.shape[1], device)
        for part, places in self._places.items():
            self.rows.facts[part] = np.concatenate([self.rows.facts.get(part, np.empty(0, np.int64)), places.facts])
        self._values = [(row, value) for row, one in enumerate(batch) for value in one.values]
        stated = np.array([value.fact for _, value in self._values], np.int64)
        self.rows.stated = np.concatenate([self.rows.stated, stated])

    def take(self, layer: int, hidden_BTX: torch.Tensor, value_BKTH: torch.Tensor, lse_BNT: torch.Tensor) -> None:
        hidden_TX, lse_TN = hidden_BTX.flatten(0, 1), lse_BNT.transpose(1, 2).flatten(0, 1)
        for part, places in self._places.items():
            name = (layer, part)
            _append(self.rows.hidden, name, hidden_TX[places.tokens].float())
            _append(self.rows.log_sum_exp, name, lse_TN[places.tokens].float())
        if self._values:
            found = value_rows(value_BKTH, self._values)
            known = self.rows.values.get(layer)
            if known is not None:
                found = torch.cat([known[0], found[0]]), torch.cat([known[1], found[1]])
            self.rows.values[layer] = found


def _append(rows: dict, name: tuple[int, int], new: torch.Tensor) -> None:
    rows[name] = torch.cat([rows[name], new]) if name in rows else new


def _thinned(one: AskedTokens) -> AskedTokens:
    """Without most of the tokens of long parts: the first of a value and of the words before it, the last others."""
    parts = list(one.parts)
    for part in (OTHER, COPY, VALUE):
        places = [at for at, found in enumerate(parts) if found == part]
        firsts = [at for at in places if part == VALUE and one.parts[at - 1] != VALUE]
        kept = set((firsts or places)[-KEPT_PER_QUESTION:])
        for at in places:
            if at not in kept:
                parts[at] = GONE
    return AskedTokens(one.input_ids, one.answer_start, parts, one.facts, one.values)
