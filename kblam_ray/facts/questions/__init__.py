"""Questions about any table of facts, for training and evaluation."""

from kblam_ray.facts.questions.maker import (
    DEFAULT_MIX,
    QUESTION_KINDS,
    REFUSAL,
    Question,
    QuestionKind,
    QuestionMaker,
    Reason,
)

__all__ = ["DEFAULT_MIX", "QUESTION_KINDS", "REFUSAL", "Question", "QuestionKind", "QuestionMaker", "Reason"]
