"""Settings of `jobs/benchmark.py serve`, `refresh` and `follow`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from kblam_ray.job import JobConfig


class _Served(JobConfig):
    base_model: str | None = Field(None, description="base model: the demo's")
    adapter: str | None = Field(None, description="knowledge adapter: the demo's")
    grounding: Literal["off", "cite", "verbatim"] = Field("verbatim", description="of the questions")
    max_tokens: PositiveInt = Field(48, description="longest answer")
    replicas: PositiveInt = Field(1, description="replicas of the server")
    seed: int = Field(0, ge=0, description="which facts are drawn")


class _Asked(_Served):
    kb: str = Field(description="the table that is asked: plain questions about its facts")


class ServeBenchmark(_Asked):
    """Settings of `jobs/benchmark.py serve`."""

    clients: list[PositiveInt] = Field([1, 8, 32], min_length=1, description="closed-loop clients at a time")
    requests: PositiveInt = Field(200, description="requests of one measurement; one at a time: a fifth of them")
    rounds: PositiveInt = Field(3, description="measurements of each case, in turns")
    stream: bool = Field(True, description="ask for streams, which tell when the first token came; else whole answers")
    one_core: bool = Field(
        False, description="give the engine one core, in this process and in the server, and all else the others"
    )


class RefreshBenchmark(_Asked):
    """Settings of `jobs/benchmark.py refresh`."""

    clients: PositiveInt = Field(16, description="closed-loop clients that ask all the time")
    seconds: Annotated[float, Field(gt=0)] = Field(60, description="shortest time with changes, in all")
    answers: PositiveInt = Field(10_000, description="fewest answers in all, with changes and without")
    every_s: Annotated[float, Field(gt=0)] = Field(1, description="one change of a fact that is asked, so often")
    rounds: PositiveInt = Field(4, description="spans without changes and spans with them, in turns")
    large_facts: int = Field(100_000, ge=0, description="facts of a second table, of the hashing encoder; 0: none")
    large_changes: PositiveInt = Field(1_000, description="facts changed at once in that table")


class FollowBenchmark(_Served):
    """Settings of `jobs/benchmark.py follow`."""

    edition: list[str] = Field(
        min_length=1, description="files of facts, oldest first: the table begins as the first and becomes the others"
    )
    changes: PositiveInt = Field(50, description="files that are added one at a time, of one fact each")
    once: int = Field(
        3, ge=0, description="files that a refresh started for each takes up, instead of one that watches"
    )
    replicas: PositiveInt = Field(2, description="replicas of the server")
    clients: PositiveInt = Field(4, description="closed-loop clients that ask while an edition becomes the next")
    steps: PositiveInt = Field(20, description="parts in which an edition becomes the next")
