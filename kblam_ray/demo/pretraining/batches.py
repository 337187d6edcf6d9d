"""Documents as tensors: what one optimizer step reads, made beside the training in a process of its own.

Shape legend: B documents of a micro-batch, T tokens of its longest, A answer tokens of all of them, Q places at which
the throw-away head is asked what the document is about, C candidates among which it chooses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from kblam_ray.demo.pretraining.documents import PROMPT_WEIGHT, VALUE_WEIGHT, Document, DocumentMaker
from kblam_ray.demo.pretraining.settings import PretrainSettings
from kblam_ray.facts.fact import Fact

MICRO_BATCH_TOKENS = 1_024
PLACES = 3
"""Places per document that the head is asked at: the last one of the prompt, and others of the answer."""

RANDOM_CANDIDATES = 768
ALIKE_CANDIDATES = 2
"""Candidates of one entity, and of one property, beside each right one: the hardest to tell from it."""


@dataclass
class MicroBatch:
    """Some documents of about one length.

    Attributes:
        input_ids_BT, mask_BT: int64, padded on the right.
        answer_rows_A: int64, flattened places whose next token is to be predicted: of answers and of readings.
        targets_A, weights_A: that token, and its weight in the loss.
        asked_rows_Q, asked_Q: flattened places that the head is asked at, and the numbers of the facts it shall name.
    """

    input_ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    answer_rows_A: torch.Tensor
    targets_A: torch.Tensor
    weights_A: torch.Tensor
    asked_rows_Q: torch.Tensor
    asked_Q: torch.Tensor


@dataclass
class Step:
    """The micro-batches of one optimizer step, and the facts among which its questions' facts are to be found."""

    micro_batches: list[MicroBatch]
    candidates_C: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return int(sum(batch.mask_BT.sum() for batch in self.micro_batches))


class Steps(Dataset):
    """Step i of a training, a pure function of the settings and i."""

    def __init__(
        self, facts: list[Fact], tokenizer: PreTrainedTokenizerBase, settings: PretrainSettings, start: int
    ) -> None:
        self._tokenizer, self._settings, self._start = tokenizer.backend_tokenizer, settings, start
        self._maker = DocumentMaker(facts, settings.seed)
        self._fact_of = {(fact.entity, fact.property): number for number, fact in enumerate(facts)}
        self._facts = facts
        self._alike: dict[str, dict[str, list[int]]] = {"entity": {}, "property": {}}
        for number, fact in enumerate(facts):
            self._alike["entity"].setdefault(fact.entity, []).append(number)
            self._alike["property"].setdefault(fact.property, []).append(number)

    def __len__(self) -> int:
        return max(0, self._settings.steps - self._start)

    def __getitem__(self, index: int) -> Step:
        settings, step = self._settings, self._start + index
        random = np.random.default_rng([settings.seed, step])
        first = step * settings.questions_per_step
        questions = [self._maker.question(first + place) for place in range(settings.questions_per_step)]
        first, progress = step * settings.readings_per_step, step / settings.steps
        readings = [self._maker.reading(first + place, progress) for place in range(settings.readings_per_step)]
        first = step * settings.repeats_per_step
        repeats = [self._maker.repeating(first + place) for place in range(settings.repeats_per_step)]
        micro_batches = self._micro_batches([*questions, *readings, *repeats], random)
        asked = torch.cat([batch.asked_Q for batch in micro_batches]).unique()
        return Step(micro_batches, self._candidates(asked.tolist(), random))

    def _micro_batches(self, documents: list[Document], random: np.random.Generator) -> list[MicroBatch]:
        prompts = [encoding.ids for encoding in self._encode([document.prompt for document in documents])]
        answers = self._encode([document.answer for document in documents])
        lengths = [len(prompt) + len(answer.ids) for prompt, answer in zip(prompts, answers, strict=True)]
        groups: list[list[int]] = [[]]
        for at in sorted(range(len(documents)), key=lengths.__getitem__):
            # Sorted, so that this one is the longest: padding takes its length times the rows.
            if groups[-1] and lengths[at] * (len(groups[-1]) + 1) > MICRO_BATCH_TOKENS:
                groups.append([])
            groups[-1].append(at)
        return [
            self._micro_batch([(documents[at], prompts[at], answers[at]) for at in group], random) for group in groups
        ]

    def _encode(self, texts: list[str]) -> list:
        return self._tokenizer.encode_batch(texts, add_special_tokens=False)

    def _micro_batch(self, rows: list[tuple[Document, list[int], Any]], random: np.random.Generator) -> MicroBatch:
        length = max(len(prompt) + len(answer.ids) - 1 for _, prompt, answer in rows)
        input_ids_BT, mask_BT = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), np.int64)
        found: dict[str, list] = {"answer_rows": [], "targets": [], "weights": [], "asked_rows": [], "asked": []}
        for row, (document, prompt, answer) in enumerate(rows):
            # The last token of all is never read, only predicted.
            ids = [*prompt, *answer.ids[:-1]]
            input_ids_BT[row, : len(ids)], mask_BT[row, : len(ids)] = ids, 1
            first = row * length + len(prompt) - 1
            found["answer_rows"] += range(first, first + len(answer.ids))
            found["targets"] += answer.ids
            if document.is_read:
                found["answer_rows"] += range(first - len(prompt) + 1, first)
                found["targets"] += prompt[1:]
                weights = [PROMPT_WEIGHT] * (len(prompt) - 1)
            else:
                weights = []
            unknown = [any(a <= start < b for a, b in document.values) for start, _ in answer.offsets]
            found["weights"] += [VALUE_WEIGHT if each else 1.0 for each in unknown] + weights
            for place, number in self._asked(document, answer.offsets, random):
                found["asked_rows"].append(first + place)
                found["asked"].append(number)
        tensors = {name: torch.tensor(values) for name, values in found.items() if name != "weights"}
        return MicroBatch(
            torch.from_numpy(input_ids_BT),
            torch.from_numpy(mask_BT),
            tensors["answer_rows"],
            tensors["targets"],
            torch.tensor(found["weights"]),
            tensors["asked_rows"].long(),
            tensors["asked"].long(),
        )

    def _asked(
        self, document: Document, offsets: list[tuple[int, int]], random: np.random.Generator
    ) -> list[tuple[int, int]]:
        """Places of the answer, counted from the prompt's last token, and the fact that is spoken of there."""
        if not document.parts:
            return []
        places = {0}
        end = document.parts[-1][0]
        inside = [place for place, (start, _) in enumerate(offsets) if place and start < end]
        if inside:
            places.update(random.choice(inside, min(PLACES - 1, len(inside)), replace=False).tolist())
        asked = []
        for place in sorted(places):
            pair = next((pair for end, pair in document.parts if offsets[place][0] < end), document.parts[0][1])
            if pair in self._fact_of:
                asked.append((place, self._fact_of[pair]))
        return asked

    def _candidates(self, asked: list[int], random: np.random.Generator) -> torch.Tensor:
        """Numbers of facts, each once, the asked ones first."""
        others: list[int] = []
        for number in asked:
            fact = self._facts[number]
            for same in (self._alike["entity"][fact.entity], self._alike["property"][fact.property]):
                others += random.choice(same, min(ALIKE_CANDIDATES, len(same)), replace=False).tolist()
        others += random.integers(len(self._facts), size=RANDOM_CANDIDATES).tolist()
        return torch.tensor(list(dict.fromkeys([*asked, *others])))
