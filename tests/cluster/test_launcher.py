"""The cluster launcher's YAML: Ray's schema, Ray's own start on a mocked AWS, and what both of them let pass."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from dockerfile_parse import DockerfileParser

from tests.cluster.manifests import CLUSTER, documents

PATH = CLUSTER / "aws" / "cluster.yaml"


def config() -> dict[str, Any]:
    return documents(PATH)[0]


def check(given: dict[str, Any]) -> dict[str, Any]:
    """Raise where the file is not what it seems; returns it with Ray's defaults."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema_defaults = {"cluster_synced_files", "file_mounts_sync_continuously", "rsync_exclude", "rsync_filter"}
    prepared = prepare_config(copy.deepcopy(given))
    validate_config(prepared)
    assert prepared.keys() - given.keys() <= schema_defaults, "a default decides something"
    types = given["available_node_types"]
    for name, node in types.items():
        least, most = node.get("min_workers", 0), node.get("max_workers", 0)
        assert 0 <= least <= most, name
        assert node["resources"], f"{name}: Ray would ask AWS what the machine has"
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
    assert types[given["head_node_type"]].get("max_workers", 0) == 0
    assert given["max_workers"] == sum(node.get("max_workers", 0) for node in types.values())
    assert given["provider"].keys() <= {
        *("type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips", "security_group"),
    }
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert any("ray start" in command for command in given[commands])
    return prepared


def test_the_file_is_right():
    check(config())


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("idle_timeout",), 5),
        (("max_workers",), 3),
        (("head_node_type",), "haed"),
        (("available_node_types", "encoder", "min_workers"), 20),
        (("available_node_types", "encoder", "max_worker"), 20),
        (("available_node_types", "encoder", "resources"), {}),
        (("available_node_types", "trainer", "resources", "GPU"), "8"),
        (("available_node_types", "trainer", "docker", "image"), "x"),
        (("provider", "regoin"), "us-east-1"),
        (("docker", "run_option"), []),
        (("worker_start_ray_commands",), []),
    ],
)
def test_the_check_finds_what_is_wrong(path, wrong):
    import jsonschema

    given = config()
    place: Any = given
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = wrong
    with pytest.raises((AssertionError, ValueError, jsonschema.ValidationError)):
        check(given)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The configuration after what `ray up` does before it starts machines, on an AWS in this process."""
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws.config import bootstrap_aws

    with pytest.MonkeyPatch.context() as patch, mock_aws():
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # the key pair is written there
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        given = check(config())
        for node in given["available_node_types"].values():
            profile = node["node_config"]["IamInstanceProfile"]["Name"]
            iam = boto3.client("iam", region_name=given["provider"]["region"])
            if profile not in {one["InstanceProfileName"] for one in iam.list_instance_profiles()["InstanceProfiles"]}:
                iam.create_instance_profile(InstanceProfileName=profile)
        yield bootstrap_aws(given)


def test_aws_would_start_these_machines(started):
    """Each request is checked against EC2's own description of it before it is sent."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

    provider = AWSNodeProvider(started["provider"], started["cluster_name"])
    for name, node in started["available_node_types"].items():
        tags = {TAG_RAY_NODE_KIND: "worker", TAG_RAY_USER_NODE_TYPE: name}
        made = provider.create_node(node["node_config"], tags, 1)
        assert [instance.instance_type for instance in made.values()] == [node["node_config"]["InstanceType"]]


def test_the_resources_are_those_of_the_machines(started):
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    undeclared = copy.deepcopy(started)
    for node in undeclared["available_node_types"].values():
        node["resources"] = {}
    found = AWSNodeProvider.fillout_available_node_types_resources(undeclared)["available_node_types"]
    for name, node in started["available_node_types"].items():
        declared = node["resources"]
        assert declared.get("GPU", 0) == found[name]["resources"].get("GPU", 0)
        options = node.get("docker", {}).get("worker_run_options", [])
        assert ("--env NVIDIA_VISIBLE_DEVICES=all" in options) is bool(declared.get("GPU"))
        if name != started["head_node_type"]:  # which takes no work
            assert declared["CPU"] == found[name]["resources"]["CPU"]
    assert found["trainer"]["resources"]["accelerator_type:A100"] == 1


def test_machines_start_from_an_image_whose_driver_runs_the_containers_cuda(started):
    """Ray's own default, which it puts in the place of `latest_dlami`, is years older than that."""
    wanted = (
        r"resolve:ssm:/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-2[4-9]\.04/latest/ami-id"
    )
    for name, node in started["available_node_types"].items():
        assert re.fullmatch(wanted, node["node_config"]["ImageId"]), name


def test_workers_come_with_the_work_and_go_with_it():
    types = config()["available_node_types"]
    assert types["encoder"]["max_workers"] > types["encoder"]["min_workers"] == 0
    assert types["trainer"]["min_workers"] == 0
    assert "GPU" not in types["encoder"]["resources"]
    assert types["head"]["resources"] == {"CPU": 0}


def test_every_process_wants_the_token_and_only_the_token_is_copied():
    given = config()
    assert "--env RAY_AUTH_MODE=token" in given["docker"]["run_options"]
    assert given["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    (head,) = [command for command in given["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in head


def test_the_token_is_put_where_the_user_of_the_image_looks_for_it(monkeypatch):
    """By Ray's own way of starting a container: it goes by HOME of the image, and where there is none by root's."""
    from ray.autoscaler._private.command_runner import DockerCommandRunner

    given = config()
    image = DockerfileParser(path=str(CLUSTER / "Dockerfile"), cache_content=True)
    runner = DockerCommandRunner(
        given["docker"],
        log_prefix="",
        node_id="i-1",
        provider=None,
        auth_config=given["auth"],
        cluster_name=given["cluster_name"],
        process_runner=subprocess,
        use_internal_ip=False,
    )
    sent: list[str] = []

    def run(command: str, **_: Any) -> bytes:
        sent.append(command)
        environment = [f"{name}={value}" for name, value in image.envs.items()]
        return json.dumps(environment).encode() if ".Config.Env" in command else b""

    monkeypatch.setattr(runner.ssh_command_runner, "run", run)
    runner.run_init(as_head=False, file_mounts=given["file_mounts"], sync_run_yet=True)
    (start,) = [command for command in sent if command.startswith("docker run ")]
    user = re.search(r"useradd .*--create-home .*?(\w+)$", image.content, re.MULTILINE)
    assert user
    assert f"/~/.ray/auth_token:/home/{user[1]}/.ray/auth_token " in start
