"""The core: exact attention over facts for any Hugging Face decoder, with nothing but torch and transformers."""

from kblam_ray.attention.adapter import AdapterConfig, BaseShape, EncoderRef, KnowledgeAdapter
from kblam_ray.attention.attach import Attachment, attach
from kblam_ray.attention.continuous import KnowledgeBatching
from kblam_ray.attention.memory import KnowledgeMemory
from kblam_ray.attention.prompt_trace import Evidence, PromptTrace, evidence_and_shares, retrieval_evidence
from kblam_ray.attention.trace import Trace, mean_shares, retrieval_scores, trace

__all__ = [
    "AdapterConfig",
    "Attachment",
    "BaseShape",
    "EncoderRef",
    "Evidence",
    "KnowledgeAdapter",
    "KnowledgeBatching",
    "KnowledgeMemory",
    "PromptTrace",
    "Trace",
    "attach",
    "evidence_and_shares",
    "mean_shares",
    "retrieval_evidence",
    "retrieval_scores",
    "trace",
]
