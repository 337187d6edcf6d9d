"""What `jobs/reproduce.py` takes; readable without torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from kblam_ray.evaluation.settings import BaselineName
from kblam_ray.job import JobConfig

ScaleName = Literal["quick", "full"]


class ReproduceSettings(JobConfig):
    """Which experiments of which suites are run, how large, and with what."""

    suite: list[str] = Field(
        ["demo"],
        min_length=1,
        description="demo, llama-3-8b-instruct, llama-3.2-1b-instruct, phi-3-mini, or a YAML file of one's own",
    )
    experiment: list[str] = Field([], description="names of experiments (default: all of the suite)")
    scale: ScaleName | None = Field(None, description="quick or full (default: quick where the suite has it)")
    output: str = Field(min_length=1, description="folder for the experiments, fitted adapters and the report")
    input: list[str] = Field(
        [], description="[NAME=]FILE of facts: one more real knowledge base for the experiments that ask real ones"
    )
    base_model: str | None = Field(None, description="a folder or a name on the hub, in place of the suite's")
    adapter: list[str] = Field(
        [],
        description="NAME=PATH: an adapter in place of the suite's of that name; PATH alone: in place of its first one",
    )
    num_questions: int | None = Field(None, ge=1, description="questions of each kind, in place of the suite's number")
    baseline: list[BaselineName] = Field([], description="only these, where the experiment has them")
    seed: int | None = Field(
        None, ge=0, lt=1 << 63, description="of the facts drawn and the questions, in place of the suite's"
    )
    num_workers: int = Field(0, ge=0, description="Ray tasks at a time; 0: in this process, without Ray")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of each Ray task")
    device: str | None = Field(None, description="torch device: cuda if there is one, else cpu")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="of the base model, in place of the suite's"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("suite", "experiment"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{name}: {next(one for one in given if given.count(one) > 1)} twice")
        if len(self.suite) > 1 and (self.base_model or self.adapter):
            raise ValueError("--base-model and --adapter are of one suite: give one --suite")
        if self.output.startswith("s3://"):
            raise ValueError("output: adapters are fitted into it: give a folder that all workers reach")
        return self
