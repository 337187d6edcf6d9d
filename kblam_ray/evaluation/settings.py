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
    selection: str = Field(
        "all", pattern=r"^(all|similar:[1-9][0-9]*)$", description="attend to all facts, or to the K nearest: similar:K"
    )
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


class EvaluateSettings(EvaluationSettings):
    """What `jobs/evaluate.py` takes."""

    kb: str | None = Field(None, description="the table: a local path or s3://bucket/prefix")
    kb_version: int | None = Field(None, ge=0, description="version of the table (default: the newest)")
    synthetic: int | None = Field(
        None, ge=1, description="instead of a table: so many synthetic facts, embedded once and kept under --output"
    )
    synthetic_seed: int = Field(
        1_000_003, ge=0, lt=1 << 63, description="of the synthetic facts; take one that nothing was trained on"
    )
    base_model: str | None = Field(None, description="base model: a folder or a name on the hub (default: the demo's)")
    adapter: str | None = Field(
        None, description="knowledge adapter: a folder or a name on the hub (default: the demo's)"
    )
    output: str | None = Field(
        None, description="folder for rows.parquet, summary.json and report.md; a path or s3://bucket/prefix"
    )
    question: str | None = Field(None, min_length=1, description="answer this one question, and evaluate nothing")
    questions: str | None = Field(
        None, description="ask the questions of this .jsonl file: question, and context, entity, property, value"
    )
    device: str | None = Field(None, description="torch device: cuda if there is one, else cpu")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="of the base model: as its configuration states unless given"
    )

    @model_validator(mode="after")
    def _check_flags(self) -> Self:
        given = self.model_fields_set
        if (self.kb is None) == (self.synthetic is None):
            raise ValueError("give --kb or --synthetic, one of the two")
        if (self.base_model is None) != (self.adapter is None):
            raise ValueError("give --base-model and --adapter, or neither: the demo's")
        if self.question and self.questions:
            raise ValueError("give --question or --questions, one of the two")
        if self.question and self.synthetic:
            raise ValueError("--question is asked of a table: give --kb")
        if self.question and "grounding" in given and len(self.grounding) != 1:
            raise ValueError("--question has one grounding")
        if self.questions and self.num_facts:
            raise ValueError("--questions are asked of all the facts: leave --num-facts out")
        if not self.question and not self.output:
            raise ValueError("give --output, where the figures go")
        return self
