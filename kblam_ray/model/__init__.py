"""A base model, an adapter and knowledge as one: asking, chat templates, the question prior, planning, bundles."""

from kblam_ray.model.asking import Answer, Citation
from kblam_ray.model.bundle import Bundle, write_bundle
from kblam_ray.model.chat import ChatTemplate
from kblam_ray.model.knowledge_model import KnowledgeModel, load_bundle
from kblam_ray.model.planner import Plan, plan
from kblam_ray.model.prior import QuestionPrior

__all__ = [
    "Answer",
    "Bundle",
    "ChatTemplate",
    "Citation",
    "KnowledgeModel",
    "Plan",
    "QuestionPrior",
    "load_bundle",
    "plan",
    "write_bundle",
]
