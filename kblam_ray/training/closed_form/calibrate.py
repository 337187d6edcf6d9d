"""Settings of a finished adapter that need no training: question prior, retrieval layers, refusal decision.

Chosen on questions about held-out facts, asked of knowledge bases of several sizes, for an adapter fitted in closed
form or trained. The settings are for use with the question prior; what attention finds alone stays
measurable by setting the prior to 0. Shape legend: M facts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch

from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.errors import AdapterError, InputError
from kblam_ray.evaluation.metrics import retrieval_ranks
from kblam_ray.evaluation.retrieval import evidence_of
from kblam_ray.facts.questions import Question, QuestionMaker
from kblam_ray.model.embedded_memory import memory_of
from kblam_ray.model.knowledge_model import KnowledgeModel
from kblam_ray.model.prior import QuestionPrior
from kblam_ray.model.refusal import evidence
from kblam_ray.table.embedded import EmbeddedFacts
from kblam_ray.training.closed_form.collect import shares_of
from kblam_ray.training.closed_form.logistic import fit_refusal
from kblam_ray.training.closed_form.prior_search import ALONE, CONTEXTS, TOLERANCE, PriorScores, PriorSearch, Setting
from kblam_ray.training.closed_form.prompt_logits import prompt_logits
from kblam_ray.training.closed_form.settings import CALIBRATION_MIX, CalibrationSettings

PROMPTS_PER_BATCH = 8
SELECTED_FACTS = 100
"""K of the `similar:K` by which `selection_log_m` is chosen."""

FEW_FACTS = 20
"""Among fewer facts every prior finds the asked one. Refusing must be learnt there all the same: facts are seldom many
when somebody tries with one or two of their own."""

MOST_TABLES = 24
"""Knowledge bases of few facts that the questions of one size are spread over: one would be a matter of luck."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
        settings: fields of `AdapterConfig`: `adapter.configure(**settings)`.
        report: JSON-able figures: by size retrieval with attention alone and with the prior, F1 of refusing.
    """

    settings: dict[str, Any]
    report: dict[str, Any] = field(default_factory=dict)


def calibrate(
    model: KnowledgeModel,
    facts: EmbeddedFacts,
    settings: CalibrationSettings | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The settings of `calibration`, which see, without the report."""
    return calibration(model, facts, settings, progress=progress).settings


def calibration(
    model: KnowledgeModel,
    facts: EmbeddedFacts,
    settings: CalibrationSettings | None = None,
    *,
    progress: Progress | None = None,
) -> Calibration:
    """Choose a model's settings by questions about facts that its adapter was not trained on.

    The adapter is as before afterwards. Of about equal choices the one with the least cross-entropy is taken.

    Args:
        model: with its tokenizer; its encoder is loaded where a prior is calibrated.
        facts: held out, embedded by the adapter's encoder.

    Raises:
        InputError: fewer than two facts, or questions that they do not allow.
        AdapterError: the model's scores of facts are not finite.
        EncoderMismatchError, EncoderNotFoundError, EncoderError: the encoder of the adapter cannot be had, or the facts
            come from another one.
    """
    settings = settings or CalibrationSettings()
    if len(facts) < 2:
        raise InputError(f"{len(facts)} facts", where="calibration", help="give at least two held-out facts")
    say = progress or (lambda text: None)
    sizes = sorted({min(size, len(facts)) for size in settings.kb_sizes})
    tables = [table for size in sizes for table in _tables(model, facts, size, settings)]
    searched = [table for table in tables if len(table.facts) >= FEW_FACTS] or tables
    config = model.adapter.config
    # The prior is added in the search: the model's own must not be in the logits.
    with _configured(model, question_prior=0.0, prior_lexical=0.0):
        search = PriorSearch.over(settings, config.layers)
        for size, of_size in groupby(searched, key=lambda table: len(table.facts)):
            num_scored = 0
            for table in of_size:
                for question, logits in table.logits(model):
                    prior = table.prior_scores(model, question) if settings.use_prior else None
                    search.add(size, logits, question.facts, prior)
                    num_scored += 1
            say(f"{size} facts: {num_scored} questions scored")
    layers = search.best_layers()
    found: dict[str, Any] = {"retrieval_layers": list(layers)}
    report: dict[str, Any] = {"attention_alone": _figures(search, layers, ALONE)}
    if settings.use_prior:
        setting = _prior_that_holds(model, searched, search, layers, say)
        found |= dict(zip(("question_prior", "prior_lexical", "prior_context"), setting, strict=True))
        report["with_prior"] = _figures(search, layers, setting)
        found["selection_log_m"] = _selection_log_m(model, tables[-1], found)
    if settings.use_refusal:
        examples, has_answer, groups = [], [], []
        with _configured(model, **found):
            for table in tables:
                for question in (*table.answerable, *table.unanswerable):
                    examples.append(table.evidence(model, question))
                    has_answer.append(bool(question.facts))
                    groups.append(len(table.facts))
        say(f"{len(examples)} questions looked at, {len(examples) - sum(has_answer)} of them without an answer")
        refusal = fit_refusal(examples, has_answer, groups, seed=settings.seed)
        found |= {"refusal_weights": refusal.weights, "refusal_threshold": refusal.threshold}
        report["refusal_f1"] = {size: round(f1, 4) for size, f1 in refusal.f1.items()}
    return Calibration(found, report)


def _prior_that_holds(
    model: KnowledgeModel, tables: Sequence[_Table], search: PriorSearch, layers: tuple[int, ...], say: Progress
) -> Setting:
    """The best prior that finds as much with itself in every KB layer as attention alone does.

    The search adds a prior to the logits of each layer as they are without one. Where lower layers attend to facts, a
    prior changes what they hand on, and a strong one may make upper layers lose what they found.
    """
    promised = {size: found for size, (found, _) in search.figures(layers, ALONE).items()}
    least = sum(promised.values()) / len(promised) - TOLERANCE
    prior = search.best_prior(layers)
    while prior[0] or prior[1]:
        shares: dict[int, list[tuple[int, int]]] = {}
        with _configured(model, question_prior=prior[0], prior_lexical=prior[1], prior_context=prior[2]):
            for table in tables:
                counted = table.num_found(model, layers), len(table.answerable)
                shares.setdefault(len(table.facts), []).append(counted)
        found = [sum(part[0] for part in some) / max(1, sum(part[1] for part in some)) for some in shares.values()]
        if sum(found) / len(found) >= least:
            return prior
        say(f"a prior of beta {prior[0]:g}, gamma {prior[1]:g} unsettles the layers above it: trying weaker ones")
        prior = search.best_prior(layers, (prior[0] + prior[1]) / 2)
    return prior


def _figures(search: PriorSearch, layers: tuple[int, ...], setting: Setting) -> dict[int, dict[str, float]]:
    return {
        size: {"top_1": round(found, 4), "cross_entropy": round(cross_entropy, 4)}
        for size, (found, cross_entropy) in search.figures(layers, setting).items()
    }


@contextmanager
def _configured(model: KnowledgeModel, **settings: Any) -> Iterator[None]:
    """The model's adapter has other settings for a while."""
    before = {name: getattr(model.adapter.config, name) for name in settings}
    model.adapter.configure(**settings)
    try:
        yield
    finally:
        model.adapter.configure(**before)


def _tables(model: KnowledgeModel, facts: EmbeddedFacts, size: int, settings: CalibrationSettings) -> Iterator[_Table]:
    """One knowledge base of the size, or several of few facts; together they have the questions of one."""
    rows_M = _rows_by_entity(facts, settings.seed)
    count = 1
    if size < FEW_FACTS:
        count = max(
            1, min(MOST_TABLES, len(facts) // size, settings.num_questions // 2, settings.num_unanswerable // 2)
        )
    for number in range(count):
        answerable, unanswerable = (
            range(total * number // count, total * (number + 1) // count)
            for total in (settings.num_questions, settings.num_unanswerable)
        )
        chosen = facts.take(rows_M[number * size : (number + 1) * size])
        yield _Table.of(model, chosen, answerable, unanswerable, settings)


@dataclass(frozen=True)
class _Table:
    """A knowledge base of one size with questions of it."""

    facts: EmbeddedFacts
    memory: KnowledgeMemory
    answerable: tuple[Question, ...]
    unanswerable: tuple[Question, ...]

    @classmethod
    def of(
        cls,
        model: KnowledgeModel,
        facts: EmbeddedFacts,
        answerable_numbers: range,
        unanswerable_numbers: range,
        settings: CalibrationSettings,
    ) -> _Table:
        """All of the facts, and questions of these numbers about them."""
        maker = QuestionMaker(facts.facts, settings.seed)
        mix = shares_of(maker, settings.question_mix, CALIBRATION_MIX)
        # Of a table with the values of one key side by side, all of them are asked for.
        answerable = tuple(maker.questions(answerable_numbers.start, answerable_numbers.stop, mix))
        unanswerable = tuple(maker.make("unanswerable", number) for number in unanswerable_numbers)
        memory = memory_of(
            model.adapter,
            facts,
            device=model.device,
            dtype=torch.bfloat16 if model.dtype == torch.bfloat16 else None,
        )
        return cls(facts, memory, answerable, unanswerable)

    def logits(self, model: KnowledgeModel) -> Iterator[tuple[Question, dict[int, torch.Tensor]]]:
        """The answerable questions, each with its logits by KB layer, [A, M]."""
        pad_id = model.chat.tokenizer.pad_token_id or 0
        rendered = [(question, model.chat.render(question.messages)) for question in self.answerable]
        rendered.sort(key=lambda one: len(one[1]))
        for start in range(0, len(rendered), PROMPTS_PER_BATCH):
            batch = rendered[start : start + PROMPTS_PER_BATCH]
            found = prompt_logits(model.attachment, [prompt for _, prompt in batch], self.memory, pad_id)
            if not all(bool(torch.isfinite(logits_BAM).all()) for logits_BAM in found.values()):
                raise AdapterError(
                    "the scores of facts are not finite",
                    where="calibration",
                    help="check the adapter and the base model for NaN, or load the base model in a wider dtype",
                )
            for row, (question, _) in enumerate(batch):
                yield question, {layer: logits_BAM[row] for layer, logits_BAM in found.items()}

    def num_found(self, model: KnowledgeModel, layers: Sequence[int]) -> int:
        """Answerable questions whose facts all come first, with the adapter's settings as they are."""
        num_found = 0
        for start in range(0, len(self.answerable), PROMPTS_PER_BATCH):
            batch = self.answerable[start : start + PROMPTS_PER_BATCH]
            prompts = [model.chat.render(question.messages) for question in batch]
            memories = [model.prepare(self.memory, question.messages) or self.memory for question in batch]
            for question, one in zip(
                batch, evidence_of(model.attachment, prompts, memories, layers=layers), strict=True
            ):
                ranks = retrieval_ranks(one.scores_M.cpu().numpy(), question.facts)
                num_found += max(ranks) <= len(ranks)
        return num_found

    def prior_scores(self, model: KnowledgeModel, question: Question) -> PriorScores:
        messages = question.messages
        cosines: dict[str, torch.Tensor] = {}
        named: dict[str, torch.Tensor] = {}
        texts: dict[str, str] = {}
        for context in CONTEXTS:
            prior = QuestionPrior(model.prior.encoder, 1.0, context)  # type: ignore[arg-type]
            text = prior.question(messages)
            known = next((other for other in texts if texts[other] == text), None)
            texts[context] = text
            if known is not None:
                cosines[context], named[context] = cosines[known], named[known]
                continue
            cosines[context] = prior.cosines(self.memory, text).float()
            # One index of the entities for all questions: the model's own prior keeps it.
            named[context] = model.prior.names_entity(self.memory, text).to(self.memory.device).float()
        return PriorScores(cosines, named)

    def evidence(self, model: KnowledgeModel, question: Question) -> dict[str, float]:
        """The features that the refusal decision rests on."""
        messages = question.messages
        prompt_ids = torch.tensor([model.chat.render(messages)], device=model.device)
        request = model.prepare(self.memory, messages)
        assert request is not None
        return evidence(model, prompt_ids, request, messages)


def _rows_by_entity(facts: EmbeddedFacts, seed: int) -> np.ndarray:
    """All rows, entity by entity in random order: a run of them has whole entities but for the first and the last."""
    rows_of: dict[str, list[int]] = {}
    for row, fact in enumerate(facts.facts):
        rows_of.setdefault(fact.entity, []).append(row)
    entities = list(rows_of)
    order = np.random.default_rng(seed).permutation(len(entities))
    return np.array([row for at in order for row in rows_of[entities[at]]], np.int64)


@torch.no_grad()
def _selection_log_m(model: KnowledgeModel, table: _Table, found: dict[str, Any]) -> str:
    """The M of the shift with which answers from a selection of the facts have the least loss."""
    config = model.adapter.config
    if config.kb_scale is None or len(table.facts) <= SELECTED_FACTS:
        return config.selection_log_m  # without a shift, or a selection, there is nothing to choose
    losses = {}
    for choice in ("whole", "selection"):
        with _configured(model, **found, selection_log_m=choice):
            losses[choice] = sum(_answer_loss(model, table, question) for question in table.answerable[:64])
    return min(losses, key=losses.__getitem__)


def _answer_loss(model: KnowledgeModel, table: _Table, question: Question) -> float:
    messages: Sequence[dict[str, str]] = question.messages
    ids, start = model.chat.render_with_answer(messages, question.answer)
    request = model.prepare(table.memory, messages, f"similar:{SELECTED_FACTS}")
    ids_1T = torch.tensor([ids], device=model.device)
    logits_TV = model(ids_1T, knowledge=request).logits[0, start - 1 : -1].float()
    return torch.nn.functional.cross_entropy(logits_TV, ids_1T[0, start:]).item()
