"""All that `jobs/refresh_kb.py` is told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kblam_ray.encoders import EncoderOptions
from kblam_ray.facts.fact import DEFAULT_IDENTITY, Identity
from kblam_ray.job import JobConfig
from kblam_ray.table.compact import RETENTION_H
from kblam_ray.table.pipeline.run import DEFAULT_ENCODER
from kblam_ray.table.plan import WriteMode
from kblam_ray.table.vacuum import MAX_RETENTION_H, MIN_RETENTION_H

MAX_S = 86_400
"""The longest time that can be set, a day: timers and threads take no endless one."""


class RefreshSettings(JobConfig, EncoderOptions):
    """What `jobs/refresh_kb.py` takes."""

    kb: str = Field(description="the table: a local path or s3://bucket/prefix; made with the first facts")
    input: list[str] = Field(
        min_length=1, description="facts: a file, directory, glob or s3:// prefix; what is there may come and go"
    )
    mode: WriteMode = Field(
        "upsert",
        description="upsert takes up new and changed files; sync makes the table equal to all files whenever one "
        "appears, changes or goes, which reads all of them",
    )
    on_error: Literal["fail", "skip"] = Field(
        "fail", description="a file with a bad row is kept out until it changes, or its bad rows are left out"
    )
    identity: Identity | None = Field(
        None, description=f"what tells two facts apart (default: the table's, {DEFAULT_IDENTITY} for a new one)"
    )
    encoder: str | None = Field(
        None, description=f"encoder name (default: the table's, {DEFAULT_ENCODER} for a new one)"
    )
    once: bool = Field(
        False,
        description="take up what is there and end, instead of watching; there is what the first look finds, and what "
        "comes later is left to the next run",
    )
    poll_s: float = Field(
        1.0, gt=0, le=MAX_S, description="seconds between looks at the inputs; longer where looking takes long"
    )
    settle_s: float = Field(
        0.5,
        ge=0,
        le=MAX_S,
        description="a local file that may still be written must have stood still for so many seconds",
    )
    sqs_queue_url: str | None = Field(None, description="a queue with the S3 events of the inputs")
    list_every_s: float = Field(
        60.0, gt=0, le=MAX_S, description="seconds between full listings where events tell what changed"
    )
    small_texts: int = Field(
        2_000, ge=0, description="up to so many new texts are embedded in this process; more by Ray's workers"
    )
    num_workers: int | None = Field(None, ge=1, description="most encoder workers (default: one per CPU)")
    min_workers: int = Field(1, ge=1, description="encoder workers to start with; the pool grows with the backlog")
    gpus_per_worker: float = Field(0, ge=0, allow_inf_nan=False, description="GPUs of each encoder worker")
    compact_files: int = Field(32, ge=0, description="compact when there are so many small files; 0: never")
    compact_dead: float = Field(
        0.5, gt=0, le=1, description="compact when so large a share of the table's rows is superseded or deleted"
    )
    vacuum_every_h: float = Field(24.0, ge=0, allow_inf_nan=False, description="hours between vacuums; 0: never")
    retention_h: int = Field(
        RETENTION_H, ge=MIN_RETENTION_H, le=MAX_RETENTION_H, description="hours that old versions stay readable"
    )
    max_refreshes: int | None = Field(None, ge=1, description="end after so many commits")
    metrics_port: int | None = Field(None, ge=0, le=65_535, description="serve Prometheus metrics on this port")
    metrics_host: str = Field("127.0.0.1", description="address that the metrics are served on")
    stop_s: float = Field(
        20.0, ge=0, le=MAX_S, description="on SIGTERM, seconds to finish the refresh that is under way"
    )
