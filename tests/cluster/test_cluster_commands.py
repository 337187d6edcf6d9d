"""Every command that a file in cluster/ holds is one that its job takes, and fits the cluster that it runs on."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kblam_ray.errors import InputError
from kblam_ray.table.pipeline.encode import ENCODER_CPUS
from tests.cluster.manifests import (
    CLUSTER,
    IN_IMAGE,
    ROOT,
    Manifest,
    containers,
    documents,
    job_commands,
    kubernetes,
    named,
    parsed,
    quantity,
)

HEADROOM = 0.9
"""Most of a cluster's CPUs that a pool of encoders may ask for: with all of them, it waits for ever for other tasks."""


def texts_of(manifest: Manifest) -> list[str]:
    """What an object runs: entrypoints, and command with arguments of each container."""
    spec = manifest.content.get("spec", {})
    found = [spec["entrypoint"]] if manifest.kind == "RayJob" else []
    for container in containers(manifest):
        command = [*container.get("command", []), *container.get("args", [])]
        found.append(command[-1] if command[:2] == ["bash", "-c"] else shlex.join(command))
    return found


def comment_commands(path: Path) -> list[str]:
    """The commands in a file's comments: lines that stand three blanks in; deeper ones go on."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not (found := re.match(r"#( {3,})(\S.*)", line)):
            continue
        if len(found[1]) > 3 and lines:
            lines[-1] = f"{lines[-1].removesuffix(chr(92))} {found[2]}"
        else:
            lines.append(found[2])
    return lines


def guide_commands() -> list[str]:
    """The shell commands of the guide, one a line."""
    guide = (CLUSTER / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", guide, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def all_commands() -> list[Any]:
    """Every start of a job in cluster/, with where it stands."""
    found = [(str(manifest), text) for manifest in kubernetes() for text in texts_of(manifest)]
    found += [
        (path.name, text)
        for path in sorted(CLUSTER.rglob("*"))
        if path.suffix == ".yaml" or path.name == "Dockerfile"
        for text in comment_commands(path)
    ]
    found += [("README.md", text) for text in guide_commands()]
    return [
        pytest.param(job, arguments, id=f"{where}-{job}")
        for where, text in found
        for job, arguments in job_commands(text)
    ]


COMMANDS = all_commands()


@pytest.mark.parametrize(("job", "arguments"), COMMANDS)
def test_the_job_takes_its_command(job, arguments):
    assert parsed(job, arguments)


@pytest.mark.parametrize(("job", "arguments"), COMMANDS)
def test_the_job_and_the_files_that_are_named_are_in_the_image(job, arguments):
    assert (ROOT / "jobs" / f"{job}.py").is_file()
    for argument in arguments:
        if argument.startswith(IN_IMAGE):
            assert (ROOT / argument.removeprefix(IN_IMAGE)).is_file()


def test_the_jobs_that_run_in_clusters_are_started_somewhere():
    started = {str(param.values[0]) for param in COMMANDS}
    assert started >= {"embed_kb", "train_adapter", "refresh_kb", "compact_kb", "evaluate", "ask"}


def test_a_wrong_flag_would_be_found():
    with pytest.raises(InputError):
        parsed("embed_kb", ["--kb", "s3://b/kb", "--input", "x", "--workers", "3"])


def test_the_schedule_refreshes_once_and_the_watcher_for_ever():
    (scheduled,) = [args for text in texts_of_kind("CronJob", "kblam-refresh") for _, args in job_commands(text)]
    (watching,) = [args for text in texts_of_kind("Deployment", "kblam-watch") for _, args in job_commands(text)]
    assert "--once" in scheduled
    assert "--once" not in watching
    # The same table from the same sources, however the flags are written.
    plain = [word for argument in scheduled if argument != "--once" for word in argument.split("=", 1)]
    assert watching[: len(plain)] == plain
    assert {word for word in watching[len(plain) :] if word.startswith("--")} == {"--metrics-host", "--metrics-port"}


def texts_of_kind(kind: str, name: str) -> list[str]:
    return [text for one in kubernetes() if (one.kind, one.name) == (kind, name) for text in texts_of(one)]


def ray_commands() -> list[Any]:
    found = [(str(manifest), text) for manifest in kubernetes() for text in texts_of(manifest)]
    found += [("cluster.yaml", text) for text in comment_commands(CLUSTER / "aws" / "cluster.yaml")]
    found += [("README.md", text) for text in guide_commands()]
    return [
        pytest.param(list(words), id=f"{where}-{' '.join(words[:3])}")
        for where, text in found
        for words in rays_own(text)
    ]


def rays_own(text: str) -> list[list[str]]:
    """The `ray ...` commands of a text, up to what ends a command in a shell."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [re.search(r"(?:^|\bexec )(ray .*?)(?:\|\||&|#|$)", line) for line in lines]
    return [shlex.split(one[1]) for one in found if one]


@pytest.mark.parametrize("words", ray_commands())
def test_rays_command_line_takes_its_commands(words, monkeypatch):
    """Each parsed by Ray's own parser, and not run."""
    from click import Context
    from ray.scripts.scripts import cli

    command: Any = cli
    arguments = words[1:]
    context = Context(cli)
    while hasattr(command, "commands"):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    # Files that a person makes are not here: whether they exist is not what is looked at.
    for parameter in command.params:
        if hasattr(parameter.type, "exists"):
            parameter.type.exists = False
    command.make_context(words[0], list(arguments), parent=context)


def test_rays_parser_refuses_a_wrong_option():
    from ray.scripts.scripts import cli

    assert CliRunner().invoke(cli, ["job", "submit", "--workin-dir", ".", "--", "true"]).exit_code == 2


def start_commands() -> list[tuple[str, list[str]]]:
    config = documents(CLUSTER / "aws" / "cluster.yaml")[0]
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    return [(line, words) for line in commands for words in rays_own(line.rpartition(";")[2].strip())]


@pytest.mark.parametrize(("line", "words"), start_commands())
def test_rays_command_line_takes_the_launchers_commands(line, words):
    from ray.scripts.scripts import cli

    command = cli.commands[words[1]]
    command.make_context("ray", words[2:])


def most_cpus(cluster: dict[str, Any]) -> float:
    """The CPUs that a cluster on Kubernetes can have."""
    return sum(
        group["maxReplicas"] * quantity(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
        for group in cluster["workerGroupSpecs"]
    )


def pools() -> list[Any]:
    """Jobs with a pool of encoders, and the CPUs that their cluster can have."""
    job = named("RayJob", "kblam-embed")["spec"]
    found = [(*command, most_cpus(job["rayClusterSpec"])) for command in job_commands(job["entrypoint"])]
    texts = [*texts_of_kind("CronJob", "kblam-refresh"), *texts_of_kind("Deployment", "kblam-watch")]
    cpus = most_cpus(named("RayCluster", "kblam-jobs")["spec"])
    found += [(*command, cpus) for text in texts for command in job_commands(text)]
    config = documents(CLUSTER / "aws" / "cluster.yaml")[0]
    cpus = sum(
        node.get("max_workers", 0) * node["resources"]["CPU"] for node in config["available_node_types"].values()
    )
    lines = comment_commands(CLUSTER / "aws" / "cluster.yaml")
    found += [(*command, cpus) for line in lines for command in job_commands(line) if command[0] == "embed_kb"]
    return found


@pytest.mark.parametrize(("job", "arguments", "cpus"), pools())
def test_pools_leave_room_for_other_tasks(job, arguments, cpus):
    settings = parsed(job, arguments)
    assert settings.num_workers * ENCODER_CPUS <= HEADROOM * cpus
    # What there is at the start is only the head, whose CPUs do not count.
    assert settings.min_workers >= 1


def test_a_training_finds_as_many_gpus_as_it_asks_for():
    job = named("RayJob", "kblam-train")["spec"]
    ((_, arguments),) = job_commands(job["entrypoint"])
    settings = parsed("train_adapter", arguments)
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    # It looks at the GPUs when it starts, so none may be still to come.
    assert group["minReplicas"] * int(limits["nvidia.com/gpu"]) == settings.num_workers * settings.gpus_per_worker
    assert settings.resume, "a retry would refuse the folder that the first try wrote into"
    assert job["backoffLimit"] > 0
    trainer = documents(CLUSTER / "aws" / "cluster.yaml")[0]["available_node_types"]["trainer"]
    assert trainer["resources"]["GPU"] == settings.num_workers
