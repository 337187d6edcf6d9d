"""The settings of the data mix and of the losses: which examples a step has, and what each term counts for."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kblam_ray.facts.questions import DEFAULT_MIX, QUESTION_KINDS, QuestionKind


class MixSettings(BaseModel):
    """What the examples of a training are. Together with the facts they determine every example by its number."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    batch_size: int = Field(32, gt=0, description="examples of one optimizer step, over all workers")
    question_mix: dict[QuestionKind, float] = Field(
        default_factory=lambda: dict(DEFAULT_MIX),
        description="share of each kind of question, in any unit; a kind that is not named has none",
    )
    withheld: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the unanswerable questions that ask for a fact which only their knowledge base lacks",
    )
    text_share: float = Field(0.1, ge=0, lt=1, description="share of the examples that are text in need of no fact")
    text_input: list[str] = Field(
        default_factory=list,
        description="JSON Lines (`text`, or `messages`) or plain text with blank lines between the texts, in place of"
        " the built-in ones",
    )
    kb_per: Literal["example", "batch"] = Field(
        "example", description="every example has a knowledge base of its own, or all of a step share one"
    )
    kb_size: tuple[int, int] = Field(
        (10, 200), description="fewest and most facts of a knowledge base, spread evenly over the orders of magnitude"
    )
    kb_growth_steps: int = Field(
        0, ge=0, description="steps over which the most facts grow from the fewest to the most; 0: the most at once"
    )
    hard_negatives: float = Field(
        0.3,
        ge=0,
        le=1,
        description="share of a knowledge base's other facts that are easily mistaken for the right ones",
    )
    held_out: float = Field(0.1, ge=0, lt=1, description="share of the entities that are never trained on")
    held_out_seed: int = Field(0, ge=0, description="which entities those are; evaluation must be told the same")
    max_tokens: int = Field(256, gt=0, description="longest example, in tokens")
    seed: int = Field(0, ge=0, lt=1 << 63, description="of questions, knowledge bases and texts")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(share < 0 for share in self.question_mix.values()) or sum(self.question_mix.values()) <= 0:
            raise ValueError(f"question_mix needs shares of 0 or more, one of them above 0; kinds: {QUESTION_KINDS}")
        fewest, most = self.kb_size
        if not 1 <= fewest <= most:
            raise ValueError(f"kb_size {fewest} to {most} is not a range of facts")
        if self.kb_per == "batch" and fewest < self.batch_size:
            # With fewer facts than questions the right fact could be guessed from its being there.
            raise ValueError(
                f"kb_per=batch needs at least as many facts as questions: kb_size begins at {fewest}, a step has"
                f" {self.batch_size} examples"
            )
        return self


class LossSettings(BaseModel):
    """What each term of the loss counts for; 0 leaves it out."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    next_token: float = Field(1.0, ge=0, description="cross-entropy of the answer's tokens")
    retrieval: float = Field(1.0, ge=0, description="cross-entropy of the facts' scores to the right facts")
    last_prompt_token: float = Field(
        4.0, gt=0, description="weight in the retrieval loss of the last prompt token, beside 1 of each answer token"
    )
    refusal: float = Field(
        0.2, ge=0, description="whether the facts' scores tell answerable questions from unanswerable ones"
    )
    divergence: float = Field(1.0, ge=0, description="divergence from the base model on text in need of no fact")
    refusal_margin: float = Field(
        4.0,
        description="nats by which the facts' log-sum-exp exceeds log M where the knowledge base may or may not answer",
    )
