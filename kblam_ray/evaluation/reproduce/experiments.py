"""Suites of experiments as YAML: what is asked of which adapters at which scale, checked when it is read.

A suite names a base model, adapters (shipped, by path, or to be fitted first), facts that are made, and experiments:
each is a part of `EvaluateSettings`. Settings are put together from the general to the particular: the suite's, the
suite's at the scale, the experiment's, the experiment's at the scale. A suite that `extends` another is that one with
what it states itself on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from kblam_ray.errors import InputError
from kblam_ray.evaluation.reproduce.settings import ScaleName
from kblam_ray.evaluation.settings import EvaluateSettings
from kblam_ray.job import JobConfig

SUITES = Path(__file__).parent / "suites"

_OWN = frozenset({"base_model", "adapter", "output", "num_workers", "gpus_per_worker", "device", "question"})
"""What a suite's settings cannot state: it is the command's."""


class AdapterRecipe(JobConfig):
    """Where an adapter comes from: one of the three."""

    shipped: str | None = Field(None, description="name of an adapter that comes with the package")
    path: str | None = Field(None, description="a folder or a name on the hub")
    fit: dict[str, Any] | None = Field(
        None, description="settings of a training, on top of the suite's `fitting`: fitted before it is evaluated"
    )
    fit_quick: dict[str, Any] = Field({}, description="on top of these at the quick scale")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(one is not None for one in (self.shipped, self.path, self.fit)) != 1:
            raise ValueError("an adapter is shipped, or has a path, or is fitted: give one of the three")
        return self


class FactsRecipe(JobConfig):
    """A file of facts made for a suite."""

    make: str = Field(description="name of the function that makes them")
    quick: int | None = Field(None, ge=1, description="so many of them, the first, at the quick scale")
    full: int | None = Field(None, ge=1, description="so many of them, the first, at the full scale")


class Experiment(JobConfig):
    """One experiment: a sweep over some of the suite's adapters."""

    title: str = Field(min_length=1, description="for the report")
    about: str = Field(min_length=1, description="what is asked, for the report")
    adapters: list[str] = Field(min_length=1, description="names of adapters of the suite")
    quick_adapters: list[str] = Field([], description="in place of these at the quick scale")
    facts: list[str] = Field([], description="names of facts of the suite, each a knowledge base of its own")
    real: bool = Field(False, description="ask the knowledge bases given by --input as well")
    settings: dict[str, Any] = Field({}, description="part of EvaluateSettings")
    quick: dict[str, Any] = Field({}, description="the same at the quick scale")
    full: dict[str, Any] = Field({}, description="the same at the full scale")


class Suite(JobConfig):
    """Experiments on one base model."""

    title: str = Field(min_length=1, description="for the report")
    about: str = Field("", description="for the report")
    base_model: str | None = Field(None, description="a name on the hub or a folder (default: the demo's)")
    dtype: str | None = Field(None, description="of the base model")
    download: str = Field("", description="what to do where the base model cannot be had")
    scales: list[ScaleName] = Field(["full"], min_length=1, description="sizes it can be run at; the first by default")
    fitting: dict[str, Any] = Field({}, description="settings of every training")
    fitting_quick: dict[str, Any] = Field({}, description="the same at the quick scale")
    adapters: dict[str, AdapterRecipe] = Field(min_length=1, description="by name")
    facts: dict[str, FactsRecipe] = Field({}, description="by name")
    settings: dict[str, Any] = Field({}, description="part of EvaluateSettings of every experiment")
    quick: dict[str, Any] = Field({}, description="the same at the quick scale")
    full: dict[str, Any] = Field({}, description="the same at the full scale")
    experiments: dict[str, Experiment] = Field(min_length=1, description="by name")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, experiment in self.experiments.items():
            for kind, known in (("adapters", self.adapters), ("quick_adapters", self.adapters), ("facts", self.facts)):
                for one in getattr(experiment, kind):
                    if one not in known:
                        raise ValueError(
                            f"experiment {name}, {kind}: there is no {one}, but {', '.join(known) or 'none'}"
                        )
        return self

    def settings_of(self, name: str, scale: ScaleName, **given: Any) -> EvaluateSettings:
        """The settings of an experiment at a scale.

        Args:
            given: what wins over the suite's; an `input` of None is filled for the check alone.

        Raises:
            InputError: no such setting, or a wrong value.
        """
        experiment = self.experiments[name]
        merged: dict[str, Any] = {}
        for part in (self.settings, getattr(self, scale), experiment.settings, getattr(experiment, scale)):
            merged |= part
        where = f"experiment {name}, {scale}"
        if taken := _OWN & merged.keys():
            raise InputError(
                f"{', '.join(sorted(taken))} in the settings of an experiment",
                where=where,
                help="leave it out: it is stated for the suite or on the command line",
            )
        try:
            return EvaluateSettings.model_validate(merged | given)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise InputError(
                f"{place + ': ' if place else ''}{first['msg']}",
                where=where,
                help="the settings are those of jobs/evaluate.py, see its --help",
            ) from None

    def adapters_of(self, name: str, scale: ScaleName) -> list[str]:
        """Names of the adapters that an experiment asks at a scale."""
        experiment = self.experiments[name]
        return (experiment.quick_adapters if scale == "quick" else []) or experiment.adapters

    def fit_of(self, name: str, scale: ScaleName) -> dict[str, Any]:
        """The settings of the training of an adapter that is fitted, without base model and output."""
        recipe = self.adapters[name]
        if recipe.fit is None:
            raise ValueError(f"adapter {name} is not fitted")
        parts = [self.fitting, self.fitting_quick if scale == "quick" else {}]
        parts += [recipe.fit, recipe.fit_quick if scale == "quick" else {}]
        merged: dict[str, Any] = {}
        for part in parts:
            merged = _merged(merged, part)
        return merged

    def scale(self, wanted: ScaleName | None) -> ScaleName:
        """The scale to run at.

        Raises:
            InputError: the suite has not that scale.
        """
        if wanted is not None and wanted not in self.scales:
            raise InputError(
                f"the suite has no scale {wanted}", where="--scale", help=f"it has {', '.join(self.scales)}"
            )
        return wanted or self.scales[0]

    def chosen(self, wanted: list[str]) -> list[str]:
        """Names of the experiments to run, in the suite's order.

        Raises:
            InputError: the suite has none of that name.
        """
        for name in wanted:
            if name not in self.experiments:
                raise InputError(
                    f"the suite has no experiment {name}",
                    where="--experiment",
                    help=f"it has {', '.join(self.experiments)}",
                )
        return [name for name in self.experiments if not wanted or name in wanted]


def suite_names() -> list[str]:
    """Names of the suites that come with the package."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def read_suite(suite: str) -> Suite:
    """A suite by its name, or by the path of its YAML file; every experiment is checked at every scale.

    Raises:
        InputError: there is no such suite, or it is wrong.
    """
    path = SUITES / f"{suite}.yaml"
    if suite not in suite_names():
        path = Path(suite)
        if not path.is_file():
            raise InputError(
                "there is no such suite", where=suite, help=f"give {', '.join(suite_names())}, or a YAML file"
            )
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read the suite: {error}", where=suite, help="give a YAML file") from None
    try:
        found = Suite.model_validate(_extended(read))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{place + ': ' if place else ''}{first['msg']}",
            where=suite,
            help=f"see {SUITES / 'demo.yaml'} for what a suite has",
        ) from None
    for name, experiment in found.experiments.items():
        for scale in found.scales:
            given: dict[str, Any] = {"output": "checked"}
            if experiment.facts or experiment.real:
                given["input"] = [
                    f"{one}=checked" for one in [*experiment.facts, *(["real"] if experiment.real else [])]
                ]
            found.settings_of(name, scale, **given)
    return found


def _extended(read: Any) -> Any:
    """What is read, on top of the suite that it `extends`, where it does."""
    if not isinstance(read, dict) or "extends" not in read:
        return read
    name = read["extends"]
    if name not in suite_names():
        raise InputError(
            f"there is no suite {name} to extend", where="extends", help=f"name one of {', '.join(suite_names())}"
        )
    other = yaml.safe_load((SUITES / f"{name}.yaml").read_text(encoding="utf-8"))
    return _merged(_extended(other), {key: value for key, value in read.items() if key != "extends"})


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Two mappings as one; what both have is the other's, and mappings in both are merged likewise."""
    found = dict(one)
    for name, value in other.items():
        both = isinstance(value, Mapping) and isinstance(found.get(name), Mapping)
        found[name] = _merged(found[name], value) if both else value
    return found
