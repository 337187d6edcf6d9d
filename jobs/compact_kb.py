"""Tidy a knowledge base: merge small and outdated files, and remove the files of versions past the retention.

    python jobs/compact_kb.py --kb kb/world
    python jobs/compact_kb.py --kb s3://bucket/world --vacuum --retention-h 720

Readers see nothing of it but a newer version; writers may go on. Deleted facts leave the files once they are older
than the retention.
"""

from typing import Any

from pydantic import Field

from kblam_ray import KnowledgeBase
from kblam_ray.errors import InputError
from kblam_ray.job import JobConfig, main
from kblam_ray.table.compact import RETENTION_H, TARGET_FILE_BYTES
from kblam_ray.table.log import TableLog
from kblam_ray.table.pipeline.spool import remove_old_spools
from kblam_ray.table.vacuum import MAX_RETENTION_H, MIN_RETENTION_H


class CompactSettings(JobConfig):
    """What `jobs/compact_kb.py` takes."""

    kb: str = Field(description="the table: a local path or s3://bucket/prefix")
    target_file_mb: float = Field(TARGET_FILE_BYTES / 2**20, gt=0, description="size of a compacted file")
    vacuum: bool = Field(False, description="also remove files that no version within the retention needs")
    retention_h: int = Field(
        RETENTION_H, ge=0, le=MAX_RETENTION_H, description="hours that delete rows stay, and versions under --vacuum"
    )
    allow_short_retention: bool = Field(
        False, description="accept a retention below the default: only where nothing else writes meanwhile"
    )


def compact(settings: CompactSettings) -> dict[str, Any]:
    if settings.vacuum and settings.retention_h < MIN_RETENTION_H and not settings.allow_short_retention:
        # Before anything is compacted: wrong settings leave the table as it is.
        raise InputError(
            f"a retention of {settings.retention_h} hours",
            where="--retention-h",
            help=f"give at least {MIN_RETENTION_H}, or --allow-short-retention if nothing else uses the table now",
        )
    kb = KnowledgeBase.open(settings.kb)
    previous, files_before = kb.version, len(TableLog.open(kb.uri).files)
    # Less than the default would let a write that began before a delete bring the fact back.
    retention_h = settings.retention_h if settings.allow_short_retention else max(settings.retention_h, RETENTION_H)
    kb.compact(target_file_bytes=int(settings.target_file_mb * 2**20), retention_h=retention_h)
    removed: list[str] = []
    if settings.vacuum:
        removed = kb.vacuum(settings.retention_h, allow_short=settings.allow_short_retention)
        remove_old_spools(kb.uri)
    return {
        "kb": kb.uri,
        "version": kb.version,
        "previous_version": previous,
        "committed": kb.version != previous,
        "num_facts": kb.num_facts,
        "files_before": files_before,
        "files_after": len(TableLog.open(kb.uri).files),
        "files_vacuumed": len(removed),
    }


if __name__ == "__main__":
    main("compact_kb", CompactSettings, compact)
