"""What attached facts do to text that needs none: perplexity, next-token divergence, and the attention they take.

Each text is a user's message in a request to chat, with the adapter's chat template around it, and what is measured is
every token of the text, each given all before it, and the first token of the answer to it. The base model without facts
is what everything is compared with.
Shape legend: T tokens, V words of the vocabulary, N query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from itertools import takewhile
from typing import Any

import numpy as np
import torch

from kblam_ray.attention.batch import Attended
from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.errors import InputError
from kblam_ray.evaluation.intervals import bootstrap, mean
from kblam_ray.evaluation.question_embeddings import RememberingEncoder
from kblam_ray.evaluation.questions import drawn_rows
from kblam_ray.evaluation.run import prior_set, priors_of
from kblam_ray.model.asking import parse_selection
from kblam_ray.model.chat import ChatTemplate
from kblam_ray.model.embedded_memory import memory_of
from kblam_ray.model.generation import check_length
from kblam_ray.model.knowledge_model import KnowledgeModel
from kblam_ray.model.prior import QuestionPrior
from kblam_ray.table.embedded import EmbeddedFacts

_NUMBERS_PER_BLOCK = 2**22
"""Logarithms of probabilities, in float64, that are held at a time."""

_NUMBERS_KEPT = 2**26
"""Logits of the base model that are kept from one number of facts to the next; of others the model runs again."""


def unrelated_texts() -> list[str]:
    """The texts that come with the package: everyday passages and chat turns that no knowledge base helps with."""
    given = (files("kblam_ray.evaluation") / "unrelated.txt").read_text(encoding="utf-8")
    return [text.strip() for text in given.split("\n\n") if text.strip()]


def measure_interference(
    model: KnowledgeModel,
    facts: EmbeddedFacts,
    sizes: Sequence[int],
    *,
    selection: str = "all",
    texts: Sequence[str] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """What numbers of facts do to texts that need none, without and, where the adapter has one, with its prior.

    Intervals are of texts drawn again, the same draws for every point. With no facts all is exactly the base model:
    a ratio of 1, a divergence and a mass of 0.

    Args:
        model: with a tokenizer; it is left as it was.
        facts: embedded by the adapter's encoder; for each size whole entities are drawn, as for questions.
        sizes: numbers of facts; 0: none.
        selection: "all" or "similar:K", as for a question.
        texts: None: those of `unrelated_texts`.
        seed: of the facts drawn and of the bootstrap.
        progress: called with a line of text for each size.

    Returns:
        `num_texts`, `num_tokens` (those predicted), `seed`, `points`: `num_facts, prior, selection` and the figures
        `perplexity` per token; `perplexity_ratio` to the base model's; `divergence`, the mean over tokens of
        KL(base model || with facts) of the next token in nats; `agreement`, the share of tokens before which the most
        likely next token stays the same; `kb_mass`, the facts' weight in the attention, mean over tokens, KB layers
        and heads; and `answer_divergence, answer_agreement, answer_kb_mass`, the same for the first token of the answer
        to the text. The count of a figure is the number of texts.

    Raises:
        InputError: no sizes, more facts wanted than there are, no texts, a text without tokens or longer than the
            base model reads, a model without a tokenizer.
        EncoderMismatchError: the facts are not the adapter's encoder's.
        EncoderNotFoundError, EncoderError: the encoder must read the texts and cannot.
    """
    _check_sizes(sizes, len(facts))
    given = unrelated_texts() if texts is None else list(texts)
    if not given:
        raise InputError("there are no texts to read", where="texts", help="give some, or leave texts out")
    num_selected = parse_selection(selection)
    priors = priors_of(model.adapter.config, None)
    read = [_Text.of(model, text) for text in given]
    encoder = None
    if any(sizes) and (True in priors or num_selected is not None):
        encoder = RememberingEncoder(model.prior.encoder)
    points = []
    base = _BaseLogits(model)
    with _evaluating(model):
        for size in dict.fromkeys(sizes):
            memory = _memory(model, facts, size, seed)
            for has_prior in priors:
                if progress is not None:
                    named = " with the question prior" if has_prior else ""
                    progress(f"{size:,} facts{named}: reading {len(read)} texts that need none")
                # Not text by text: what is derived from an adapter's weights is made anew when it is configured.
                with prior_set(model.adapter, has_prior):
                    requests = (_prepared(model, encoder, memory, text, num_selected) for text in read)
                    found = [_measure(model, base, text, one) for text, one in zip(read, requests, strict=True)]
                points.append({"num_facts": size, "prior": has_prior, "selection": selection, **_figures(found, seed)})
    num_tokens = sum(text.end - text.start for text in read)
    return {"num_texts": len(read), "num_tokens": num_tokens, "seed": seed, "points": points}


@dataclass(frozen=True)
class _Text:
    """A text in its prompt.

    Attributes:
        message: the text as the user's message.
        ids: the prompt, up to where the answer begins.
        start, end: the text's tokens are ids[start:end]; before the first there is at least one.
    """

    message: dict[str, str]
    ids: list[int]
    start: int
    end: int

    @classmethod
    def of(cls, model: KnowledgeModel, text: str) -> _Text:
        message = {"role": "user", "content": text}
        ids = model.chat.render([message])
        # What stands around every message is the template's.
        before, after = _around(model.chat)
        start, end = max(1, _shared(ids, before)), len(ids) - _shared(ids[::-1], after[::-1])
        if not text.strip() or end <= start:
            raise InputError("a text without a token to predict", where=repr(text[:80]), help="give a longer one")
        check_length(model, len(ids))
        return cls(message, ids, start, end)

    @property
    def places(self) -> list[int]:
        """The tokens looked at: those before each token of the text, and last the one before the answer."""
        return [*range(self.start - 1, self.end - 1), len(self.ids) - 1]


def _around(chat: ChatTemplate) -> tuple[list[int], list[int]]:
    """The tokens before a message and those behind it, up to where the answer begins."""
    one, other = (chat.render([{"role": "user", "content": letter}]) for letter in ("0", "x"))
    return one[: _shared(one, other)], one[len(one) - _shared(one[::-1], other[::-1]) :]


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


@dataclass(frozen=True)
class _Measured:
    """What was found in one text: sums over its tokens, and the same where the answer to it begins.

    Attributes:
        base_loss, loss: minus the logarithms of the tokens' probabilities, in nats.
        divergence, answer_divergence: in nats.
        num_agreed, answer_agreement: tokens before which the most likely one is the base model's.
    """

    num_tokens: int
    base_loss: float
    loss: float
    divergence: float
    num_agreed: int
    kb_mass: float
    answer_divergence: float
    answer_agreement: int
    answer_kb_mass: float


def _check_sizes(sizes: Sequence[int], num_facts: int) -> None:
    if not sizes or min(sizes) < 0:
        raise InputError(
            f"numbers of facts {list(sizes)}", where="interference", help="give some, each 0 or more: 0, 100, 10000"
        )
    if max(sizes) > num_facts:
        # Before the smaller sizes, which may take hours.
        raise InputError(
            f"{max(sizes)} facts of {num_facts}", where="interference", help="ask for fewer, or embed more"
        )


@contextmanager
def _evaluating(model: KnowledgeModel) -> Iterator[None]:
    """No dropout and no autograd for a while."""
    modes = [(module, module.training) for module in model.base_model.modules()]
    model.base_model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, is_training in modes:
            module.training = is_training


def _memory(model: KnowledgeModel, facts: EmbeddedFacts, size: int, seed: int) -> KnowledgeMemory:
    rows = drawn_rows(facts, size, seed, lambda entity: True) if size else []
    dtype = torch.bfloat16 if model.dtype == torch.bfloat16 else None
    return memory_of(model.adapter, facts, rows, device=model.device, dtype=dtype)


def _prepared(
    model: KnowledgeModel,
    encoder: RememberingEncoder | None,
    memory: KnowledgeMemory,
    text: _Text,
    num_selected: int | None,
) -> KnowledgeMemory:
    """What a request with the text as its question attends to."""
    config = model.adapter.config
    if encoder is None or not memory.num_facts:
        return memory
    if num_selected is None and not config.question_prior and not config.prior_lexical:
        return memory
    return QuestionPrior.of(config, encoder).apply(memory, [text.message], num_selected)


class _Mass:
    """Adds up, over KB layers, the facts' weight in the attention at some tokens: a `batch.Recorder`."""

    def __init__(self, places: Sequence[int]) -> None:
        self._places = torch.tensor(places)
        self.sum_T = torch.zeros(len(places), dtype=torch.float64)

    def record(self, layer: int, attended: Attended, weight_TN: torch.Tensor) -> None:
        self.sum_T += weight_TN[self._places.to(weight_TN.device)].double().mean(1).cpu()


class _BaseLogits:
    """What the base model says without facts at the places of a text, [T, V]."""

    def __init__(self, model: KnowledgeModel) -> None:
        self._model = model
        self._kept: dict[tuple[int, ...], torch.Tensor] = {}
        self._room = _NUMBERS_KEPT

    def of(self, text: _Text) -> torch.Tensor:
        key = tuple(text.ids)
        if key in self._kept:
            return self._kept[key]
        ids_1T = torch.tensor([text.ids], device=self._model.device)
        logits_TV = self._model(ids_1T, use_cache=False).logits[0, text.places]
        if logits_TV.numel() <= self._room:
            self._room -= logits_TV.numel()
            self._kept[key] = logits_TV
        return logits_TV


def _measure(model: KnowledgeModel, base: _BaseLogits, text: _Text, memory: KnowledgeMemory) -> _Measured:
    base_TV = base.of(text)
    mass = _Mass(text.places)
    ids_1T = torch.tensor([text.ids], device=model.device)
    with model.attachment.using(memory, mass):
        found_TV = model.base_model(input_ids=ids_1T, use_cache=False).logits[0, text.places]
    mass_T = mass.sum_T / len(model.adapter.config.layers)
    # The answer's first token is not known.
    next_T = torch.tensor([*text.ids[text.start : text.end], 0], device=model.device)
    losses, divergences = [], []
    # In float64: of a divergence of 0.0001 nats float32 would leave little.
    for block in torch.arange(len(next_T), device=model.device).split(max(1, _NUMBERS_PER_BLOCK // base_TV.shape[1])):
        base_tV, found_tV = (logits_TV[block].double().log_softmax(1) for logits_TV in (base_TV, found_TV))
        losses.append(-torch.stack([base_tV, found_tV]).gather(2, next_T[block].expand(2, 1, -1).mT).squeeze(2))
        # A word that the base model rules out adds nothing, though its logarithm is infinite.
        is_possible = base_tV > float("-inf")
        divergences.append((base_tV.exp() * (base_tV - found_tV)).where(is_possible, 0.0).sum(1))
    loss_2T, divergence_T = torch.cat(losses, 1), torch.cat(divergences)
    agrees_T = base_TV.argmax(1) == found_TV.argmax(1)
    return _Measured(
        num_tokens=text.end - text.start,
        base_loss=float(loss_2T[0, :-1].sum()),
        loss=float(loss_2T[1, :-1].sum()),
        divergence=float(divergence_T[:-1].sum()),
        num_agreed=int(agrees_T[:-1].sum()),
        kb_mass=float(mass_T[:-1].sum()),
        answer_divergence=float(divergence_T[-1]),
        answer_agreement=int(agrees_T[-1]),
        answer_kb_mass=float(mass_T[-1]),
    )


def _figures(found: Sequence[_Measured], seed: int) -> dict[str, Any]:
    sums = {
        name: np.array([getattr(one, name) for one in found], np.float64) for name in _Measured.__dataclass_fields__
    }

    def per_token(name: str, *, less: str | None = None, is_logarithm: bool = False) -> dict[str, Any]:
        totals = sums[name] - (sums[less] if less else 0.0)

        def figure(samples: np.ndarray) -> np.ndarray:
            shares = totals[samples].sum(1) / sums["num_tokens"][samples].sum(1)
            return np.exp(shares) if is_logarithm else shares

        return bootstrap(figure, len(found), seed=seed).to_json()

    return {
        "perplexity": per_token("loss", is_logarithm=True),
        "perplexity_ratio": per_token("loss", less="base_loss", is_logarithm=True),
        "divergence": per_token("divergence"),
        "agreement": per_token("num_agreed"),
        "kb_mass": per_token("kb_mass"),
        **{
            name: mean(sums[name], seed=seed).to_json()
            for name in ("answer_divergence", "answer_agreement", "answer_kb_mass")
        },
    }
