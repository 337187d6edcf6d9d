"""Reading what lies in cluster/: YAML documents, pod templates, containers, and the job commands in any of them."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from kblam_ray.job import JobConfig, parse

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
IN_IMAGE = "/opt/kblam-ray/"
"""Where the image holds jobs/ and the settings."""

_COMMAND = re.compile(r"python\s+(?:\S*/)?jobs/(\w+)\.py((?:[ \t]+[^\s;&|]+)*)")


class UniqueKeys(yaml.SafeLoader):
    """A loader that refuses a mapping with one key twice, of which YAML would take the last."""


def _mapping(loader: UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    twice = {key for key in keys if keys.count(key) > 1}
    assert not twice, f"{twice} stands twice at {node.start_mark}"
    return dict(loader.construct_mapping(node, deep=True))


UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def documents(path: Path) -> list[dict[str, Any]]:
    """All documents of a YAML file, for the caller to change as it likes."""
    return copy.deepcopy(_read(path))


@lru_cache
def _read(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.load_all(path.read_text(encoding="utf-8"), UniqueKeys) if document]


@dataclass(frozen=True)
class Manifest:
    """One Kubernetes object and the file it stands in."""

    path: Path
    content: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.content["kind"])

    @property
    def name(self) -> str:
        return str(self.content["metadata"]["name"])

    def __str__(self) -> str:
        return f"{self.path.name}:{self.kind}/{self.name}"


def kubernetes() -> list[Manifest]:
    """Every Kubernetes object in cluster/."""
    paths = sorted([*(CLUSTER / "kuberay").glob("*.yaml"), *(CLUSTER / "monitoring").glob("*.yaml")])
    return [Manifest(path, document) for path in paths for document in documents(path)]


def named(kind: str, name: str) -> dict[str, Any]:
    (found,) = [one.content for one in kubernetes() if (one.kind, one.name) == (kind, name)]
    return found


def walk(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value in nested mappings and lists, with the way to it."""
    yield path, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from walk(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from walk(inner, (*path, number))


def pod_templates(manifest: Manifest) -> list[tuple[str, dict[str, Any]]]:
    """The pod templates in an object, with the way to each."""
    return [
        ("/".join(map(str, path)), value)
        for path, value in walk(manifest.content)
        if isinstance(value, dict) and isinstance(value.get("spec"), dict) and "containers" in value["spec"]
    ]


def containers(manifest: Manifest) -> list[dict[str, Any]]:
    return [container for _, template in pod_templates(manifest) for container in template["spec"]["containers"]]


def ray_clusters() -> list[tuple[Manifest, dict[str, Any]]]:
    """The cluster specifications of every RayCluster, RayJob and RayService."""
    found = []
    for manifest in kubernetes():
        spec = manifest.content.get("spec", {})
        if manifest.kind == "RayCluster":
            found.append((manifest, spec))
        found += [(manifest, spec[name]) for name in ("rayClusterSpec", "rayClusterConfig") if name in spec]
    return found


def serve_config() -> dict[str, Any]:
    """What stands under serveConfigV2 of the server."""
    return dict(yaml.load(named("RayService", "kblam-server")["spec"]["serveConfigV2"], UniqueKeys))


def job_commands(text: str) -> list[tuple[str, list[str]]]:
    """The jobs that a text starts, with their arguments; lines that end with a backslash go on."""
    text = text.replace("\\\n", " ")
    return [(name, shlex.split(arguments)) for name, arguments in _COMMAND.findall(text)]


def settings_of(job: str) -> type[JobConfig]:
    """What a job takes."""
    path = ROOT / "jobs" / f"{job}.py"
    spec = importlib.util.spec_from_file_location(job, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (found,) = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, JobConfig) and kind is not JobConfig
    ]
    return found


def parsed(job: str, arguments: list[str]) -> Any:
    """The settings that a command in the image would have; files of the image are read from the repository.

    Raises:
        InputError: the job does not take them.
    """
    arguments = [argument.replace(IN_IMAGE, f"{ROOT}/") for argument in arguments]
    return parse(job, settings_of(job), arguments)


_FACTORS = {
    "": 1,
    "m": 1e-3,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}


def quantity(text: Any) -> float:
    """A Kubernetes quantity as a number."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]*)", str(text))
    assert found, text
    return float(found[1]) * _FACTORS[found[2]]


def dashboard() -> dict[str, Any]:
    return dict(json.loads((CLUSTER / "monitoring" / "dashboard.json").read_text(encoding="utf-8")))
