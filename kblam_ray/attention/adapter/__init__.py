"""The adapter: what is trained so that one base model can attend to the facts of one encoder."""

from kblam_ray.attention.adapter.config import AdapterConfig, BaseShape, EncoderRef
from kblam_ray.attention.adapter.knowledge_adapter import KnowledgeAdapter

__all__ = ["AdapterConfig", "BaseShape", "EncoderRef", "KnowledgeAdapter"]
