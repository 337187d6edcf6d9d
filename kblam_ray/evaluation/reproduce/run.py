"""Run suites of experiments: adapters and facts first, then a sweep for each, and one report of all of them.

Everything is kept below the output folder: `EXPERIMENT/` is a sweep that can be resumed, `adapters/`, `facts/` and
`tables/` are what the experiments share, `report.html` and `summary.json` are of all. With several suites each has a
folder of its own. Running the same again does what is missing.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from kblam_ray.errors import InputError, KblamError, MissingDependencyError
from kblam_ray.evaluation.report import Published, Section, make_report, write_report
from kblam_ray.evaluation.reproduce.experiments import Suite, read_suite
from kblam_ray.evaluation.reproduce.prepare import Fit, MakeFacts, Preparation, given_adapters
from kblam_ray.evaluation.reproduce.published import NOT_RUN, published_table
from kblam_ray.evaluation.reproduce.settings import ReproduceSettings, ScaleName
from kblam_ray.evaluation.sources import SYNTHETIC, Source, named, read_input
from kblam_ray.evaluation.sweep.environment import environment
from kblam_ray.evaluation.sweep.run import ROWS_SCHEMA, sweep
from kblam_ray.evaluation.sweep.store import SUMMARY, json_bytes, write_sweep
from kblam_ray.model.base_model import read_base_config
from kblam_ray.storage import normalize, replace_file

BASE_MODEL = "base_model"
"""Name, among what is shipped, of the base model of suites that name none."""

REPORT_PACKAGES = ("jinja2", "matplotlib")

Progress = Callable[[str], None]


@dataclass
class _Run:
    """One suite of a run, as far as it has come."""

    name: str
    suite: Suite
    scale: ScaleName
    experiments: list[str]
    base_model: str
    folder: Path
    is_alone: bool
    not_run: str | None = None
    sections: dict[str, Section] = field(default_factory=dict)
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    fitted: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What the base model is called in tables."""
        return self.base_model.rpartition("/")[2] if self.suite.base_model else "the demo model"


def run(
    settings: ReproduceSettings,
    *,
    fit: Fit,
    make_facts: MakeFacts,
    shipped: Mapping[str, str],
    check_fit: Callable[[Mapping[str, Any]], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the experiments chosen and write the report of them.

    Args:
        fit: trains an adapter, told what the training job is told, and gives its summary.
        make_facts: functions that write a file of facts and give their number, by the name that suites have for them.
        shipped: the base model (`BASE_MODEL`) and adapters that come with the package, by name: folders.
        check_fit: raises where settings of a training are wrong; called before anything is run.
        progress: called with a line of text as it goes on.

    Returns:
        The job's summary: `output, report, experiments, fitted, not_run`.

    Raises:
        MissingDependencyError: a package that the report needs is not installed.
        InputError: a suite, an experiment or an adapter that is not there; no base model of any suite can be had: the
            report, with the published figures alone, is written before.
        KblamError: what a training or a sweep raises; the report of the experiments before it is written.
    """
    tell = progress or (lambda line: None)
    output = Path(settings.output).expanduser().absolute()
    runs = [_read(settings, name, output, shipped) for name in settings.suite]
    names = [one.name for one in runs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two suites of the name {twice}", where="--suite", help="give their files other names")
    _require_report()
    for one in runs:
        _check(one, settings, check_fit)
    # A wrong file on the command line is found before hours of work, not after.
    given = {name: normalize(place) for name, place in named(settings.input, "--input").items()}
    for name, place in given.items():
        read_input(Source(name, "input", place))
    if given:
        _check_names(runs, given)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the folder cannot be made: {error.strerror}", where=str(output), help="give another --output"
        ) from None
    reasons = {one.name: reason for one in runs if (reason := _missing(one))}
    for one in runs:
        one.not_run = reasons[one.name].what if one.name in reasons else None
    if len(reasons) == len(runs):
        _write(settings, output, runs)
        first = next(iter(reasons.values()))
        raise InputError(first.what, where=first.where, help=first.help)
    try:
        for one in runs:
            if one.not_run is None:
                _run_suite(one, settings, given, fit, make_facts, shipped, tell)
            else:
                tell(f"{one.name}: {NOT_RUN}: {one.not_run}")
    except KblamError:
        # What was measured until then can be looked at.
        if any(one.sections for one in runs):
            _write(settings, output, runs)
        raise
    return _write(settings, output, runs)


def _read(settings: ReproduceSettings, name: str, output: Path, shipped: Mapping[str, str]) -> _Run:
    suite = read_suite(name)
    base_model = settings.base_model or suite.base_model or shipped[BASE_MODEL]
    short = Path(name).stem if name.endswith((".yaml", ".yml")) else name
    is_alone = len(settings.suite) == 1
    folder = output if is_alone else output / short
    scale, experiments = suite.scale(settings.scale), suite.chosen(settings.experiment)
    return _Run(short, suite, scale, experiments, base_model, folder, is_alone)


def _require_report() -> None:
    """Make sure that the report can be written, before the hours that it is about."""
    for package in REPORT_PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(
                f"the report needs the package {package}", help='pip install "kblam-ray[evaluate]"'
            )


def _check(one: _Run, settings: ReproduceSettings, check_fit: Callable[[Mapping[str, Any]], None] | None) -> None:
    """Everything that can be known to be wrong before anything is run."""
    given = given_adapters(one.suite, settings.adapter)
    needed = {name for experiment in one.experiments for name in one.suite.adapters_of(experiment, one.scale)}
    for name in sorted(needed - given.keys()):
        if check_fit is not None and one.suite.adapters[name].fit is not None:
            recipe = one.suite.fit_of(name, one.scale)
            check_fit({**recipe, "base_model": one.base_model, "output": str(one.folder)})


def _check_names(runs: Sequence[_Run], given: Mapping[str, str]) -> None:
    """Names that no facts of a suite have, and experiments that ask for them."""
    taken = {SYNTHETIC, *(name for one in runs for name in one.suite.facts)} & given.keys()
    if taken:
        name = min(taken)
        raise InputError(
            f"the suite has facts of the name {name!r} already", where="--input", help="write --input OTHER-NAME=FILE"
        )
    if not any(one.suite.experiments[name].real for one in runs for name in one.experiments):
        raise InputError(
            "no experiment chosen asks facts of one's own", where="--input", help="choose one that does, such as `real`"
        )


def _missing(one: _Run) -> InputError | None:
    """Why the suite's base model cannot be had, with what to do about it; None: it can."""
    try:
        read_base_config(one.base_model)
    except InputError as error:
        # What is said of the suite's own model helps with no other one.
        has_advice = one.suite.download and one.base_model == one.suite.base_model
        advice = f"{one.suite.download}; or give" if has_advice else "give"
        where = f"suite {one.name}, {one.base_model}"
        return InputError(error.what, where=where, help=f"{advice} its folder: --base-model")
    return None


def _run_suite(
    one: _Run,
    settings: ReproduceSettings,
    given: Mapping[str, str],
    fit: Fit,
    make_facts: MakeFacts,
    shipped: Mapping[str, str],
    tell: Progress,
) -> None:
    adapters = given_adapters(one.suite, settings.adapter)
    preparation = Preparation(
        one.suite, one.scale, one.folder, one.base_model, adapters, shipped, fit, make_facts, settings, tell, one.fitted
    )
    for number, name in enumerate(one.experiments, start=1):
        started = time.monotonic()

        def say(line: str, name: str = name, number: int = number) -> None:
            tell(f"{one.name}, {name} ({number} of {len(one.experiments)}): {line}")

        preparation.tell = say
        say("begins")
        experiment = one.suite.experiments[name]
        folder = one.folder / name
        candidates = preparation.adapters(one.suite.adapters_of(name, one.scale))
        files = preparation.files(experiment.facts) | (dict(given) if experiment.real else {})
        told: dict[str, Any] = {"input": [f"{title}={path}" for title, path in files.items()]} if files else {}
        if settings.num_questions is not None:
            told["num_questions"] = settings.num_questions
        if settings.seed is not None:
            told["seed"] = settings.seed
        if settings.baseline:
            stated = one.suite.settings_of(name, one.scale, **told, output=str(folder)).baseline
            told["baseline"] = [baseline for baseline in stated if baseline in settings.baseline]
        asked = one.suite.settings_of(
            name,
            one.scale,
            **told,
            output=str(folder),
            num_workers=settings.num_workers,
            gpus_per_worker=settings.gpus_per_worker,
            device=settings.device,
            dtype=settings.dtype or one.suite.dtype,
        )
        found = sweep(
            asked,
            one.base_model,
            candidates,
            tables=str(preparation.tables),
            progress=say,
            note={"suite": one.name, "experiment": name, "scale": one.scale, "command": _command()},
        )
        write_sweep(str(folder), found.rows, found.summary)
        one.sections[name] = _section(one, name, found.summary, found.rows)
        one.done[name] = {
            "output": str(folder),
            "num_units": found.num_units,
            "num_resumed": found.num_resumed,
            "num_rows": len(found.rows),
            "seconds": round(time.monotonic() - started, 1),
        }
        say(f"done in {one.done[name]['seconds']:,.0f} s")


def _section(one: _Run, name: str, summary: Mapping[str, Any] | None, rows: pa.Table | None = None) -> Section:
    """A section of the report; without a summary it has the published figures alone."""
    experiment = one.suite.experiments[name]
    told = published_table(
        name, base_model=one.suite.base_model or "", label=one.label, summary=None if one.not_run else summary
    )
    published = None if told is None else Published(told.head, told.rows, told.note)
    about = experiment.about if one.not_run is None else f"{NOT_RUN.capitalize()}: {one.not_run}. {experiment.about}"
    title = experiment.title if one.not_run is None else f"{experiment.title} ({one.label}: {NOT_RUN})"
    return Section(
        name=name if one.is_alone else f"{one.name}-{name}",
        title=title,
        about=about,
        summary=summary or _nothing(one),
        rows=ROWS_SCHEMA.empty_table() if rows is None else rows,
        published=published,
    )


def _nothing(one: _Run) -> dict[str, Any]:
    """The summary of a sweep that was not run."""
    return {
        "settings": {},
        "environment": {**environment(), "command": _command()},
        "base_model": one.base_model,
        "candidates": {},
        "sources": {},
        "units": [],
        "notes": [f"{NOT_RUN}: {one.not_run}"],
    }


def _write(settings: ReproduceSettings, output: Path, runs: list[_Run]) -> dict[str, Any]:
    """The report and `summary.json`; the job's summary."""
    sections = []
    for one in runs:
        for name in one.experiments:
            if one.not_run is not None:
                sections.append(_section(one, name, None))
            elif name in one.sections:
                sections.append(one.sections[name])
    title = "; ".join(one.suite.title for one in runs)
    about = " ".join(one.suite.about for one in runs if one.suite.about)
    names = write_report(str(output), make_report(title, sections, about=about))
    report = next((name for name in names if name.endswith(".html")), names[0])
    summary = {
        "output": str(output),
        "report": str(output / report),
        "experiments": {one.name: one.done for one in runs if one.not_run is None},
        "fitted": {one.name: one.fitted for one in runs if one.fitted},
        "not_run": {one.name: one.not_run for one in runs if one.not_run is not None},
    }
    whole = {
        **summary,
        "command": _command(),
        "settings": settings.model_dump(mode="json"),
        "environment": environment(),
        "suites": {
            one.name: {"title": one.suite.title, "base_model": one.base_model, "scale": one.scale} for one in runs
        },
        "published": {
            f"{one.name}/{name}": {"head": list(told.head), "rows": [list(row) for row in told.rows], "note": told.note}
            for one in runs
            for name, told in _published(one)
        },
    }
    replace_file(str(output / SUMMARY), json_bytes(whole))
    return summary


def _published(one: _Run) -> list[tuple[str, Published]]:
    sections = {name: one.sections.get(name) or _section(one, name, None) for name in one.experiments}
    return [(name, section.published) for name, section in sections.items() if section.published is not None]


def _command() -> str:
    return shlex.join(["python", *sys.argv])
