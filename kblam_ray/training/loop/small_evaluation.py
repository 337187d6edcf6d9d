"""A quick look at how an adapter does on held-out facts while it is trained: retrieval by attention alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kblam_ray.attention.adapter import KnowledgeAdapter
from kblam_ray.evaluation.run import evaluate
from kblam_ray.evaluation.settings import EvaluationSettings
from kblam_ray.model.knowledge_model import KnowledgeModel
from kblam_ray.table.embedded import EmbeddedFacts
from kblam_ray.training.settings import TrainSettings


def held_out_figures(
    base_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: KnowledgeAdapter,
    facts: EmbeddedFacts,
    settings: TrainSettings,
) -> dict[str, float]:
    """Retrieval of simple and two-entity questions about held-out entities, and how well scores tell refusals.

    Args:
        adapter: a copy of the one in training, which is attached for the time of the evaluation.
        facts: all of the run's.

    Returns:
        `retrieval@1`, `retrieval@5` and, where there are questions of both sorts, `refusal_auc`: shares from 0 to 1.
    """
    asked = EvaluationSettings(
        num_facts=[min(settings.evaluation_facts, len(facts))],
        num_questions=settings.evaluation_questions,
        kinds=["simple", "two_entity", "unanswerable"],
        held_out=settings.mix.held_out or None,
        held_out_seed=settings.mix.held_out_seed,
        prior=False,
        grounding=["off"],
        baseline=[],
        retrieval_only=True,
        seed=settings.seed,
    )
    model = KnowledgeModel(base_model, adapter.eval(), tokenizer)
    try:
        with _without_recomputation(base_model):
            (size,) = evaluate(model, facts, asked).summary()["sizes"]
    finally:
        model.detach()
    (result,) = size["results"]
    found = {f"retrieval{k}": float(figure["value"]) for k, figure in result["retrieval"]["all"].items()}
    area = result.get("refusal", {}).get("all", {}).get("area_under_curve")
    return found if area is None else {**found, "refusal_auc": float(area["value"])}


@contextmanager
def _without_recomputation(base_model: PreTrainedModel) -> Iterator[None]:
    """Leaves layers that compute activations again as they were: an evaluation puts the model into another mode."""
    modes = {module: module.training for module in base_model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
