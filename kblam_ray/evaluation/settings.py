"""What an evaluation asks, and of what; without torch, so that jobs can be told apart from the libraries they need."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from kblam_ray.job import JobConfig

AnswerableKind = Literal["simple", "paraphrase", "misspelt", "two_entity", "follow_up"]
EvaluatedKind = Literal["simple", "paraphrase", "misspelt", "two_entity", "follow_up", "unanswerable"]
GroundingName = Literal["off", "cite", "verbatim"]
BaselineName = Literal["cosine", "dense"]


class EvaluationSettings(JobConfig):
    """What `evaluate` takes: sizes, questions and what is compared."""

    num_facts: list[int] = Field([], description="facts in the knowledge base, drawn from those given (default: all)")
    num_questions: int = Field(500, ge=1, description="questions of each kind that has an answer")
    kinds: list[EvaluatedKind] = Field(
        ["simple", "paraphrase", "misspelt", "two_entity", "follow_up", "unanswerable"],
        min_length=1,
        description="kinds of question; those that the facts do not allow are left out and named",
    )
    unanswerable: float = Field(
        0.25, gt=0, le=4, description="questions that have no answer, by number of those that have one"
    )
    held_out: float | None = Field(
        None, gt=0, le=1, description="ask only about this share of the entities, the one that training holds out"
    )
    held_out_seed: int = Field(0, ge=0, description="of the split into entities trained on and held out")
    prior: bool | None = Field(None, description="with the question prior only, or attention alone (default: both)")
    grounding: list[GroundingName] = Field(["off", "verbatim"], description="how answers are grounded")
    baseline: list[BaselineName] = Field(
        ["cosine", "dense"],
        description="cosine: the question's embedding against the keys; dense: the base model reads its nearest facts",
    )
    retrieval_only: bool = Field(False, description="write no answers: retrieval and refusal by scores alone")
    read_facts: int = Field(5, ge=1, le=64, description="facts that the dense baseline reads")
    max_new_tokens: int = Field(64, ge=1, description="longest answer, in tokens")
    batch_size: int = Field(64, ge=1, description="prompts in one forward pass")
    form: Literal["latent", "materialized", "auto"] = Field("latent", description="how facts are kept in memory")
    seed: int = Field(0, ge=0, lt=1 << 63, description="of the facts drawn and the questions")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(size < 1 for size in self.num_facts):
            raise ValueError(f"num_facts {min(self.num_facts)}: give 1 or more")
        if set(self.kinds) == {"unanswerable"}:
            raise ValueError("kinds: only unanswerable questions: add a kind that has an answer")
        return self
