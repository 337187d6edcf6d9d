"""Evaluate a knowledge model on facts: retrieval, answers and refusal by size of the knowledge base, beside baselines.

    evaluation = evaluate(model, EmbeddedFacts.of(kb), EvaluationSettings(num_facts=[100, 1000]))
    evaluation.summary()     # figures with confidence intervals, as JSON has them
    evaluation.rows          # a row for each question and way of answering, a pyarrow table

For each size the ways of answering are `attention` without and with the question prior, each with every grounding, and
the baselines; all of them are asked the same questions of the same facts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.attention.adapter.config import AdapterConfig
from kblam_ray.errors import InputError
from kblam_ray.evaluation.attending import attention_outcomes
from kblam_ray.evaluation.baselines.bm25 import library
from kblam_ray.evaluation.baselines.run import baseline_outcomes, needs_encoder
from kblam_ray.evaluation.outcomes import SCHEMA, Outcome, System, rows_table, with_bert_scores
from kblam_ray.evaluation.own_questions import OwnQuestion, own_set
from kblam_ray.evaluation.question_embeddings import RememberingEncoder
from kblam_ray.evaluation.questions import Asked, EvaluationSet
from kblam_ray.evaluation.settings import EvaluationSettings
from kblam_ray.evaluation.summary import result
from kblam_ray.evaluation.task import Progress, Task
from kblam_ray.evaluation.wording import BertScore, require_rouge
from kblam_ray.model.knowledge_model import KnowledgeModel
from kblam_ray.model.matching import require_encoder
from kblam_ray.model.prior import QuestionPrior
from kblam_ray.table.embedded import EmbeddedFacts


@dataclass(frozen=True)
class SizeEvaluation:
    """What came of the questions at one size of the knowledge base.

    Attributes:
        facts: the knowledge base.
        questions: in the order of each list of outcomes.
        outcomes: by way of answering.
        left_out: kinds of question and baselines that were wanted and cannot be had, and why.
        threshold: the adapter's: attention refuses below it.
        is_probability: attention's statistic is one.
    """

    facts: EmbeddedFacts
    questions: tuple[Asked, ...]
    outcomes: dict[System, list[Outcome]]
    left_out: dict[str, str]
    threshold: float | None = None
    is_probability: bool = False

    def summary(self, *, seed: int = 0) -> dict[str, Any]:
        """Counts, and the figures of each way of answering, see `summary.result`."""
        asked = {row for question in self.questions for row in question.wanted}
        return {
            "num_facts": len(self.facts),
            "num_entities": len({fact.entity for fact in self.facts.facts}),
            "num_questions": dict(Counter(question.kind for question in self.questions)),
            "num_facts_asked": len(asked),
            "left_out": self.left_out,
            "results": [self._result(system, seed) for system in self.outcomes],
        }

    def _result(self, system: System, seed: int) -> dict[str, Any]:
        # The statistic of a baseline is a score of its own, which nothing is refused by.
        decides = system.name == "attention"
        return result(
            system,
            self.questions,
            self.outcomes[system],
            seed=seed,
            threshold=self.threshold if decides else None,
            is_probability=self.is_probability and decides,
        )


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        settings: what was asked for.
        sizes: one part per size of the knowledge base.
        notes: what a reader of the figures has to know.
    """

    settings: EvaluationSettings
    sizes: tuple[SizeEvaluation, ...]
    notes: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """`notes` and `sizes`, as JSON has them; every figure is `value, low, high, count`, the interval 95 %."""
        sizes = [size.summary(seed=self.settings.seed) for size in self.sizes]
        return {"notes": list(self.notes), "sizes": sizes}

    @property
    def rows(self) -> pa.Table:
        """One row per size, way of answering and question, with the columns of `outcomes.SCHEMA`."""
        tables = [rows_table(len(size.facts), size.questions, size.outcomes) for size in self.sizes]
        return pa.concat_tables(tables) if tables else SCHEMA.empty_table()


def evaluate(
    model: KnowledgeModel,
    facts: EmbeddedFacts,
    settings: EvaluationSettings,
    *,
    own: Sequence[OwnQuestion] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Ask a model questions about facts and say how it did.

    The model is left as it was; training may call this between two steps. Without a prior to evaluate, a selection and
    baselines that embed questions, no encoder is loaded.

    Args:
        model: with a tokenizer.
        facts: where the knowledge base of each size is drawn from, embedded by the adapter's encoder.
        settings: sizes, questions, priors, groundings, baselines.
        own: ask these instead of making questions, of all the facts.
        progress: called with a line of text as the evaluation goes on; None: silent.

    Raises:
        InputError: more facts wanted than there are, a prior wanted that the adapter has not, nothing to ask, no
            model for BERTScore.
        EncoderMismatchError: the facts or the encoder are not the adapter's.
        EncoderNotFoundError, EncoderError: the encoder must read questions and cannot.
        MissingDependencyError: a baseline or a measure needs a package that is not installed.
    """
    adapter = model.adapter
    require_encoder(adapter.config, facts.encoder, where="facts")
    if own is not None and settings.num_facts:
        raise InputError(
            "a number of facts with questions of one's own", where="num_facts", help="leave it out: all facts are used"
        )
    if any(size > len(facts) for size in settings.num_facts):
        # Before the smaller sizes, which may take hours.
        raise InputError(
            f"{max(settings.num_facts)} facts of {len(facts)}", where="num_facts", help="ask for fewer, or embed more"
        )
    if "bm25" in settings.baseline:
        library()
    scorer = _bert_score(model, settings)
    if not settings.retrieval_only:
        require_rouge()
    notes: list[str] = []
    priors = priors_of(adapter.config, settings.prior)
    if settings.prior is None and True not in priors:
        notes.append("the adapter has no question prior: attention alone")
    is_read = True in priors or settings.selection != "all" or needs_encoder(settings)
    encoder = RememberingEncoder(model.prior.encoder) if is_read else None
    if adapter.config.refusal_threshold is None:
        notes.append("the adapter has no refusal threshold: a question counts as refused by the answer's text alone")
    sizes = []
    modes = [(module, module.training) for module in model.base_model.modules()]
    model.base_model.eval()
    try:
        numbers: list[int | None] = [*settings.num_facts] or [None]
        for num_facts in numbers:
            if own is None:
                chosen = EvaluationSet.draw(facts, num_facts, settings, refusal=adapter.config.refusal_text)
            else:
                chosen = own_set(facts, own)
            found = _evaluate_size(model, chosen, settings, priors, encoder, progress)
            if scorer is not None:
                if progress is not None:
                    progress(f"{len(found.facts):,} facts, BERTScore of the answers")
                found = replace(found, outcomes=with_bert_scores(found.questions, found.outcomes, scorer))
            sizes.append(found)
    finally:
        for module, is_training in modes:
            module.training = is_training
    return Evaluation(settings, tuple(sizes), tuple(notes))


def _evaluate_size(
    model: KnowledgeModel,
    chosen: EvaluationSet,
    settings: EvaluationSettings,
    priors: Sequence[bool],
    encoder: RememberingEncoder | None,
    progress: Progress | None,
) -> SizeEvaluation:
    task = Task.of(model, chosen, settings, encoder, progress)
    outcomes: dict[System, list[Outcome]] = {}
    for has_prior in priors:
        with prior_set(model.adapter, has_prior):
            outcomes |= attention_outcomes(task, has_prior=has_prior)
    prior = None if encoder is None else QuestionPrior.of(model.adapter.config, encoder)
    left_out = dict(chosen.left_out)
    outcomes |= baseline_outcomes(task, prior, left_out)
    config = model.adapter.config
    return SizeEvaluation(
        chosen.facts,
        chosen.questions,
        outcomes,
        left_out,
        threshold=config.refusal_threshold,
        is_probability=config.refusal_weights is not None,
    )


def _bert_score(model: KnowledgeModel, settings: EvaluationSettings) -> BertScore | None:
    """What scores answers, where that was asked for; loaded before them, which may take hours."""
    if settings.bert_score_model is None:
        if settings.bert_score_layer is not None:
            raise InputError("a layer of no model", where="bert_score_layer", help="give bert_score_model, too")
        return None
    if settings.retrieval_only:
        raise InputError(
            "BERTScore of answers, and no answers", where="bert_score_model", help="leave it or retrieval_only out"
        )
    return BertScore.load(settings.bert_score_model, settings.bert_score_layer, device=model.device)


def priors_of(config: AdapterConfig, wanted: bool | None) -> list[bool]:
    """Attention alone, with the question prior, or the one after the other.

    Args:
        wanted: one of the two; None: both where the adapter has a prior.

    Raises:
        InputError: a prior is wanted that the adapter has not.
    """
    has_prior = bool(config.question_prior or config.prior_lexical)
    if wanted and not has_prior:
        raise InputError(
            "the adapter has no question prior", where="prior", help="calibrate it, or evaluate attention alone"
        )
    if wanted is not None:
        return [wanted]
    return [False, True] if has_prior else [False]


@contextmanager
def prior_set(adapter: KnowledgeAdapter, has_prior: bool) -> Iterator[None]:
    """Keep the adapter's question prior, or take it away for a while."""
    config = adapter.config
    stored = {"question_prior": config.question_prior, "prior_lexical": config.prior_lexical}
    if not has_prior:
        adapter.configure(**dict.fromkeys(stored, 0.0))
    try:
        yield
    finally:
        adapter.configure(**stored)
