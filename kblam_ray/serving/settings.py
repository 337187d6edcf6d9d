"""What a server is told: YAML, the flags of `jobs/serve.py` and the arguments of a Serve application alike."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, StringConstraints

from kblam_ray.job import JobConfig

KB_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Names of knowledge bases stand in paths and, after a colon, in model names."""

KB_NAME = re.compile(KB_NAME_PATTERN)

KbName = Annotated[str, StringConstraints(pattern=KB_NAME_PATTERN)]


class EngineSettings(JobConfig):
    """The engine of one replica."""

    max_tokens: PositiveInt = Field(256, description="longest answer of a request that names no max_tokens")
    num_blocks: PositiveInt | None = Field(
        None, description="blocks of the paged cache, 256 tokens each; on a GPU what its memory holds"
    )
    max_batch_tokens: PositiveInt | None = Field(
        None, description="most tokens computed in one step; on a GPU what its memory holds"
    )


class KnowledgeSettings(JobConfig):
    """How a replica keeps knowledge bases in memory and follows their tables."""

    form: Literal["latent", "materialized", "auto"] = Field("latent", description="how facts are kept in memory")
    budget_bytes: PositiveInt = Field(
        4_000_000_000,
        description="memory for knowledge bases per replica; beyond it the least recently used are unloaded",
    )
    poll_s: PositiveFloat = Field(0.5, description="how often a table is asked for a newer version")
    select_above: PositiveInt = Field(
        20_000,
        description="tables with more facts are asked with selection similar:`selected_facts` unless a request says",
    )
    selected_facts: PositiveInt = Field(1_000, description="K of that selection")
    index_above: PositiveInt = Field(
        100_000,
        description="larger tables get an approximate index for `similar:K`; others are searched exactly",
    )


class LimitSettings(JobConfig):
    """What a server takes before it says no."""

    max_ongoing_requests: PositiveInt = Field(32, description="requests that one replica works on at a time")
    max_queued_requests: PositiveInt = Field(128, description="requests that may wait; the next one is answered 429")
    retry_after_s: PositiveInt = Field(1, description="the Retry-After of 429 and 503")
    request_timeout_s: PositiveFloat = Field(60, description="longest time for one request; then 503")
    drain_timeout_s: PositiveFloat = Field(30, description="longest wait for running requests when stopping")
    min_version_wait_s: PositiveFloat = Field(
        5, le=5, description="longest wait for a request's min_kb_version; then 409"
    )
    max_body_bytes: PositiveInt = Field(16_000_000, description="largest request body; then 413")
    max_facts: PositiveInt = Field(10_000, description="most facts in one write; then 413. Larger: jobs/embed_kb.py")
    max_choices: PositiveInt = Field(8, description="largest n")


class ReplicaSettings(JobConfig):
    """How many replicas answer, and what each is given."""

    min_replicas: PositiveInt = Field(1, description="fewest replicas that answer")
    max_replicas: PositiveInt = Field(1, description="most replicas; more than `min_replicas` turns autoscaling on")
    target_ongoing_requests: PositiveFloat = Field(16, description="requests per replica that autoscaling aims at")
    upscale_delay_s: float = Field(5, ge=0, description="how long there must be too much to do before one more comes")
    downscale_delay_s: float = Field(300, ge=0, description="how long there must be too little before one goes")
    gateways: PositiveInt = Field(1, description="processes that speak HTTP")
    num_cpus: float = Field(1, ge=0, description="logical CPUs of a replica")
    num_gpus: float = Field(0, ge=0, description="GPUs of a replica")
    lease_s: PositiveFloat = Field(3, description="a replica not heard of for so long does not count any more")


class ServeSettings(JobConfig):
    """What `jobs/serve.py` and the Serve application take."""

    kb: list[str] = Field(default_factory=list, description="[NAME=]URI of a knowledge base to serve")
    base_model: str | None = Field(None, description="base model: a folder or a name on the hub; the demo's")
    adapter: str | None = Field(None, description="knowledge adapter: a folder or a name on the hub; the demo's")
    bundle: str | None = Field(None, description="a folder of jobs/bundle_model.py instead of base model and adapter")
    model_name: str | None = Field(
        None, min_length=1, description="what clients call the model; the base model's name without its folder"
    )
    device: str | None = Field(None, description="torch device of each replica: cuda if there is one, else cpu")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="of the base model: as its configuration states unless given"
    )
    host: str = Field("127.0.0.1", description="address to listen on; beyond loopback only with keys")
    port: int = Field(8000, ge=1, le=65535, description="port to listen on")
    grounding: Literal["off", "cite", "verbatim"] = Field("cite", description="grounding of requests that name none")
    state_uri: str | None = Field(
        None, description="one JSON object, local or s3://, that remembers knowledge bases and pins over restarts"
    )
    app_name: str = Field("kblam-ray", min_length=1, description="name of the Serve application")
    engine: EngineSettings = Field(default_factory=EngineSettings, description="the engine of a replica")
    knowledge: KnowledgeSettings = Field(default_factory=KnowledgeSettings, description="knowledge bases in memory")
    limits: LimitSettings = Field(default_factory=LimitSettings, description="what is refused")
    replicas: ReplicaSettings = Field(default_factory=ReplicaSettings, description="processes")
