"""Settings of the closed-form fit and of the calibration, readable without torch."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kblam_ray.facts.questions import QuestionKind

FIT_MIX: dict[QuestionKind, float] = {
    "simple": 0.45,
    "paraphrase": 0.15,
    "misspelt": 0.05,
    "two_entity": 0.15,
    "open_ended": 0.05,
    "follow_up": 0.05,
    "unanswerable": 0.1,
}
"""Questions that regressions see: those with one right key most of all."""

CALIBRATION_MIX: dict[QuestionKind, float] = {
    "simple": 0.4,
    "paraphrase": 0.2,
    "misspelt": 0.1,
    "two_entity": 0.15,
    "follow_up": 0.15,
}


class ClosedFormSettings(BaseModel):
    """How much the closed-form fit looks at, and what it chooses among."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_questions: int = Field(4_000, ge=1, description="questions whose hidden states the regressions see")
    num_held_out_questions: int = Field(
        256, ge=8, description="questions about held-out entities that choose among the candidates"
    )
    question_mix: dict[QuestionKind, float] | None = Field(
        None, description="share of each kind of question; unset: a mix of all that the facts allow"
    )
    held_out: float = Field(0.1, gt=0, lt=1, description="share of the entities that choose and are not fitted on")
    ridges: tuple[float, ...] = Field(
        (1e-5, 1e-4, 1e-3, 1e-2), min_length=1, description="ridge strengths tried, as parts of the mean variance"
    )
    shrinkages: tuple[float, ...] = Field(
        (0.03, 0.1, 0.3, 1.0),
        min_length=1,
        description="parts of the mean residual variance added to the residual covariance of the predicted keys",
    )
    key_shares: tuple[float, ...] = Field(
        (0.0, 0.2, 0.4),
        min_length=1,
        description="shares tried of the covariance of all keys in that of the residuals",
    )
    prompt_shares: tuple[float, ...] = Field(
        (0.3, 0.6, 0.9),
        min_length=1,
        description="weights tried of the last prompt token beside the answer's tokens in the query regression",
    )
    max_candidate_layers: int = Field(
        8,
        ge=1,
        description="layers tried as retrieval layers, evenly spread and ending with the last, where no KB"
        " layers are given",
    )
    num_value_layers: int = Field(
        2,
        ge=1,
        description="last layers that become KB layers of kind shared besides the retrieval layer, where no KB"
        " layers are given",
    )
    kb_size: int = Field(500, ge=2, description="facts of the knowledge base on which candidates are compared")
    num_gate_questions: int = Field(
        48, ge=1, description="held-out questions whose answers' loss chooses the gates' margins"
    )
    batch_tokens: int = Field(4_096, ge=1, description="tokens of one forward pass, padding included")
    block_questions: int = Field(
        128, ge=1, description="questions that are batched together; workers share blocks out, never questions"
    )
    num_workers: int = Field(0, ge=0, description="Ray workers that run the passes; 0: this process does")
    seed: int = Field(0, ge=0, description="of the questions and of what is held out")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("ridges", "shrinkages"):
            if any(value <= 0 for value in getattr(self, name)):
                raise ValueError(f"{name} must be above 0")
        if any(not 0 < share <= 1 for share in self.prompt_shares):
            raise ValueError("prompt_shares must be above 0 and at most 1")
        if any(not 0 <= share <= 1 for share in self.key_shares):
            raise ValueError("key_shares must be from 0 to 1")
        return self


class CalibrationSettings(BaseModel):
    """How the question prior and the refusal decision are calibrated."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kb_sizes: tuple[int, ...] = Field(
        (1, 10, 100, 1_000, 10_000),
        min_length=1,
        description="sizes of the knowledge bases asked; those above the number of facts become that number. Several"
        " are asked of sizes below 20, for the refusal decision alone",
    )
    num_questions: int = Field(200, ge=2, description="answerable questions per size")
    num_unanswerable: int = Field(150, ge=2, description="unanswerable questions per size")
    question_mix: dict[QuestionKind, float] | None = Field(
        None, description="share of each kind among the answerable ones; unset: plain and not plain ones"
    )
    betas: tuple[float, ...] = Field(
        (0.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 80.0, 120.0),
        min_length=1,
        description="weights of the question prior tried",
    )
    gammas: tuple[float, ...] = Field(
        (0.0, 2.0, 4.0, 6.0, 8.0, 12.0), min_length=1, description="weights of the lexical term tried"
    )
    use_prior: bool = Field(True, description="calibrate a question prior; needs the adapter's encoder")
    use_refusal: bool = Field(True, description="calibrate the refusal decision")
    seed: int = Field(1, ge=0, description="of the questions and of the choice of facts")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(size < 1 for size in self.kb_sizes):
            raise ValueError("kb_sizes must be at least 1")
        if min(self.betas) < 0 or min(self.gammas) < 0:
            raise ValueError("betas and gammas must be 0 or more")
        return self
