"""What an evaluation asks, and of what; without torch, so that jobs can be told apart from the libraries they need."""

from __future__ import annotations

import math
import re
from typing import Literal, Self

from pydantic import Field, model_validator

from kblam_ray.job import JobConfig

AnswerableKind = Literal["simple", "paraphrase", "misspelt", "two_entity", "follow_up"]
EvaluatedKind = Literal["simple", "paraphrase", "misspelt", "two_entity", "follow_up", "unanswerable"]
GroundingName = Literal["off", "cite", "verbatim"]
BaselineName = Literal["cosine", "dense", "bm25", "zero_shot", "in_context"]
EntitiesName = Literal["held_out", "trained"]

ALL_BASELINES: tuple[BaselineName, ...] = ("cosine", "dense", "bm25", "zero_shot", "in_context")
SELECTION = r"^(all|similar:[1-9][0-9]*)$"


class AskedSettings(JobConfig):
    """What every evaluation is told: sizes, questions and what is compared."""

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
        None,
        gt=0,
        le=1,
        description="ask only about this share of the entities, the one that training holds out (or, see `entities`,"
        " only about the others)",
    )
    held_out_seed: int = Field(0, ge=0, description="of the split into entities trained on and held out")
    prior: bool | None = Field(None, description="with the question prior only, or attention alone (default: both)")
    grounding: list[GroundingName] = Field(["off", "verbatim"], description="how answers are grounded")
    baseline: list[BaselineName] = Field(
        ["cosine", "dense"],
        description="cosine: the question's embedding against the keys; dense, bm25: the base model reads the facts"
        " nearest by that cosine, or by their words; zero_shot: it reads none; in_context: all, as long as they fit",
    )
    retrieval_only: bool = Field(False, description="write no answers: retrieval and refusal by scores alone")
    read_facts: int = Field(5, ge=1, le=64, description="facts that dense and bm25 read")
    bert_score_model: str | None = Field(
        None, description="BERTScore of answers by this model: a folder or a name on the hub (default: not measured)"
    )
    bert_score_layer: int | None = Field(
        None, ge=0, description="its layer (default: the one published for a model of that name, else the last)"
    )
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


class EvaluationSettings(AskedSettings):
    """What `evaluate` takes: one way of attending, on one set of entities."""

    selection: str = Field("all", pattern=SELECTION, description="attend to all facts, or to the K nearest: similar:K")
    entities: EntitiesName = Field(
        "held_out", description="with a held-out share: ask about that one, or about the entities trained on"
    )


class EvaluateSettings(AskedSettings):
    """What `jobs/evaluate.py` takes: a sweep over every combination of the settings that are lists."""

    kb: list[str] = Field([], description="[NAME=]URI of a table: a local path or s3://bucket/prefix")
    kb_version: int | None = Field(None, ge=0, description="version of the one table given (default: the newest)")
    input: list[str] = Field(
        [], description="[NAME=]FILE of facts, embedded by each adapter's encoder and kept under --output"
    )
    synthetic: int | None = Field(
        None, ge=1, description="so many synthetic facts, embedded once per encoder and kept under --output"
    )
    synthetic_seed: int = Field(
        1_000_003, ge=0, lt=1 << 63, description="of the synthetic facts; take one that nothing was trained on"
    )
    base_model: str | None = Field(None, description="base model: a folder or a name on the hub (default: the demo's)")
    adapter: list[str] = Field(
        [], description="[NAME=]PATH of a knowledge adapter: a folder or a name on the hub (default: the demo's)"
    )
    selection: list[str] = Field(
        ["all"], min_length=1, description="attend to all facts, or to the K nearest: similar:K"
    )
    kb_scale: list[float] = Field([], description="C of the shift log C - log M (default: the adapter's)")
    entities: list[EntitiesName] = Field(
        ["held_out"], min_length=1, description="with --held-out: ask about those entities, or those trained on"
    )
    baseline: list[BaselineName] = Field(
        list(ALL_BASELINES), description=AskedSettings.model_fields["baseline"].description
    )
    interference: list[int] = Field(
        [], description="facts attached while text that needs none is read; 0: none, what the others stand beside"
    )
    cost: list[int] = Field([], description="facts at which time and memory of an answer are measured")
    output: str | None = Field(
        None, description="folder for rows.parquet, summary.json, plots and the report; a path or s3://bucket/prefix"
    )
    num_workers: int = Field(0, ge=0, description="Ray tasks at a time; 0: in this process, without Ray")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of each Ray task")
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
        num_sources = len(self.kb) + len(self.input) + (self.synthetic is not None)
        if not num_sources:
            raise ValueError("give --kb, --input or --synthetic: what shall be asked")
        if self.kb_version is not None and (len(self.kb) != 1 or num_sources != 1):
            raise ValueError("--kb-version is of one table: give one --kb and nothing beside it")
        if (self.base_model is None) != (not self.adapter):
            raise ValueError("give --base-model and --adapter, or neither: the demo's")
        if self.question and self.questions:
            raise ValueError("give --question or --questions, one of the two")
        if self.question and (num_sources, len(self.kb), len(self.adapter) <= 1) != (1, 1, True):
            raise ValueError("--question is asked of one table by one adapter: give one --kb")
        if self.question and any(len(getattr(self, name)) > 1 for name in ("selection", "kb_scale")):
            raise ValueError("--question has one selection and one C")
        if self.question and "grounding" in given and len(self.grounding) != 1:
            raise ValueError("--question has one grounding")
        if self.question and self.num_facts:
            raise ValueError("--question is asked of all the facts: leave --num-facts out")
        if self.questions and self.num_facts:
            raise ValueError("--questions are asked of all the facts: leave --num-facts out")
        if self.questions and num_sources != 1:
            raise ValueError("--questions are asked of one knowledge base")
        if any(not re.match(SELECTION, one) for one in self.selection):
            raise ValueError("selection: give all, or similar:K")
        if not all(0 < scale < math.inf for scale in self.kb_scale):
            raise ValueError("kb_scale: C is a finite number larger than 0")
        if "trained" in self.entities and self.held_out is None:
            raise ValueError("entities: with --held-out, the share that training held out")
        if any(size < 0 for size in (*self.interference, *self.cost)):
            raise ValueError("interference, cost: numbers of facts are 0 or more")
        if not self.question and not self.output:
            raise ValueError("give --output, where the figures go")
        return self
