"""What experiments stand on: facts that are made, tables of them, and adapters that are fitted first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kblam_ray.attention.adapter.config import EncoderRef
from kblam_ray.encoders.load import encoder_spec
from kblam_ray.errors import InputError
from kblam_ray.evaluation.reproduce.experiments import Suite
from kblam_ray.evaluation.reproduce.settings import ReproduceSettings, ScaleName
from kblam_ray.evaluation.sources import NAME, Source, make_table
from kblam_ray.evaluation.sweep.store import json_bytes
from kblam_ray.facts import RejectedRow, expand_inputs, read_facts
from kblam_ray.facts.fact import Fact
from kblam_ray.facts.writing import write_facts
from kblam_ray.storage import replace_file

Fit = Callable[[Mapping[str, Any]], Mapping[str, Any]]
MakeFacts = Mapping[str, Callable[[Path], int]]
Tell = Callable[[str], None]

FITTED = "fitted.json"
"""Written into an adapter's folder when it is whole."""


@dataclass
class Preparation:
    """Facts and adapters of a suite, each made once and kept in the output folder.

    Attributes:
        output: the folder.
        base_model: a name or folder.
        given: adapters in place of the suite's, by name.
        shipped: folders of the adapters that come with the package, by name.
        fit: trains an adapter: takes settings as the training job does.
        make_facts: functions that write a file of facts, by name.
        fitted: what was fitted in this run, with the training's summary.
    """

    suite: Suite
    scale: ScaleName
    output: Path
    base_model: str
    given: Mapping[str, str]
    shipped: Mapping[str, str]
    fit: Fit
    make_facts: MakeFacts
    settings: ReproduceSettings
    tell: Tell
    fitted: dict[str, Any] = field(default_factory=dict)

    @property
    def tables(self) -> Path:
        """Where tables are kept, for all experiments together."""
        return self.output / "tables"

    def adapters(self, names: list[str]) -> dict[str, str]:
        """Folders or hub names of adapters, fitted where that must be.

        Raises:
            InputError and its kinds: a recipe that cannot be followed; see the training job.
        """
        return {name: self._adapter(name) for name in names}

    def _adapter(self, name: str) -> str:
        recipe = self.suite.adapters[name]
        if name in self.given:
            return self.given[name]
        if recipe.path is not None:
            return recipe.path
        if recipe.shipped is not None:
            if recipe.shipped not in self.shipped:
                raise InputError(
                    f"no adapter {recipe.shipped} comes with the package",
                    where=f"adapter {name}",
                    help=f"give one of {', '.join(self.shipped) or 'none'}, or a path",
                )
            return self.shipped[recipe.shipped]
        return self._fitted(name)

    def _fitted(self, name: str) -> str:
        recipe = self.suite.fit_of(name, self.scale) | {"base_model": self.base_model}
        if self.settings.device is not None:
            recipe["device"] = self.settings.device.partition(":")[0]
        digest = hashlib.blake2b(json.dumps(recipe, sort_keys=True).encode(), digest_size=4).hexdigest()
        folder = self.output / "adapters" / f"{name}-{digest}"
        mark = folder / FITTED
        if mark.is_file():
            return str(folder)
        self.tell(f"fitting adapter {name} into {folder}")
        summary = self.fit({**self._with_table(recipe), "output": str(folder), "resume": True})
        replace_file(str(mark), json_bytes({"recipe": recipe, "summary": dict(summary)}))
        self.fitted[name] = {"folder": str(folder), "seconds": summary.get("seconds")}
        return str(folder)

    def _with_table(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe with a table of its made-up facts, so that adapters with one encoder share it."""
        num_facts, encoder = recipe.get("synthetic"), recipe.get("encoder")
        if not num_facts or not encoder:
            return dict(recipe)
        seed = recipe.get("synthetic_seed", 0)
        spec = encoder_spec(encoder)
        table = make_table(
            Source("training", "synthetic", num_facts=num_facts, seed=seed),
            EncoderRef(name=spec.name, revision=spec.revision, dim=spec.dim),
            str(self.tables),
            gpus_per_worker=self.settings.gpus_per_worker,
            tell=self.tell,
        )
        left = {key: value for key, value in recipe.items() if key not in ("synthetic", "synthetic_seed", "encoder")}
        return {**left, "kb": [*left.get("kb", []), table.uri]}

    def files(self, names: list[str]) -> dict[str, str]:
        """Files of facts by name, made where they are not there.

        Raises:
            InputError: nothing makes these facts.
            MissingDependencyError: a package that they come from is not installed.
        """
        return {name: str(self._file(name)) for name in names}

    def _file(self, name: str) -> Path:
        recipe = self.suite.facts[name]
        if recipe.make not in self.make_facts:
            raise InputError(
                f"nothing makes the facts {recipe.make}",
                where=f"facts {name}",
                help=f"give one of {', '.join(self.make_facts) or 'none'}",
            )
        first = getattr(recipe, self.scale)
        folder = self.output / "facts"
        path = folder / f"{name}{f'-{first}' if first else ''}.jsonl"
        if path.is_file():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        self.tell(f"making facts: {name}")
        whole = folder / f"whole-{path.name}" if first else path
        # Both are written whole or not at all.
        self.make_facts[recipe.make](whole)
        if first:
            write_facts(_first(whole, first), str(path))
            whole.unlink()
        return path


def given_adapters(suite: Suite, given: list[str]) -> dict[str, str]:
    """`[NAME=]PATH` arguments as paths by name of the suite's adapters.

    Raises:
        InputError: the suite has no adapter of that name, or two are given in place of one.
    """
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not NAME.fullmatch(name):
            name, path = next(iter(suite.adapters)), text
        if name not in suite.adapters:
            raise InputError(
                f"the suite has no adapter {name}", where="--adapter", help=f"it has {', '.join(suite.adapters)}"
            )
        if name in found:
            raise InputError(f"two adapters in place of {name}", where="--adapter", help="write NAME=PATH")
        found[name] = path
    return found


def _first(path: Path, number: int) -> list[Fact]:
    found: list[Fact] = []
    for row in read_facts(*expand_inputs([str(path)])):
        if isinstance(row, RejectedRow):
            raise row.to_error()
        found.append(row.fact)
        if len(found) == number:
            break
    return found
