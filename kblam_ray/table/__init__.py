"""The versioned table of embedded facts."""

from kblam_ray.table.changes import Changes
from kblam_ray.table.knowledge_base import KnowledgeBase
from kblam_ray.table.live import LIVE_FACTS_SQL
from kblam_ray.table.schema import TableInfo
from kblam_ray.table.snapshot import Snapshot

__all__ = ["LIVE_FACTS_SQL", "Changes", "KnowledgeBase", "Snapshot", "TableInfo"]
