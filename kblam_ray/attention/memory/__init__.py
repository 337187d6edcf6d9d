"""Knowledge memories: facts in immutable chunks, ready for one adapter to attend to."""

from kblam_ray.attention.memory.chunk import Chunk, ChunkView
from kblam_ray.attention.memory.knowledge_memory import MATERIALIZED_FACTS, KnowledgeMemory, choose_form

__all__ = ["MATERIALIZED_FACTS", "Chunk", "ChunkView", "KnowledgeMemory", "choose_form"]
