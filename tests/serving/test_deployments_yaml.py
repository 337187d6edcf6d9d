"""The Serve YAML files are what Serve and the application take, misspelt keys and clashing numbers included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import DeploymentSchema, LoggingConfig, ServeApplicationSchema, ServeDeploySchema

from kblam_ray.demo.application import with_demo_model
from kblam_ray.errors import InputError
from kblam_ray.serving.deployments.application import build
from kblam_ray.serving.deployments.registry import UserConfig
from kblam_ray.serving.settings import ServeSettings

FOLDER = Path(__file__).parents[2] / "cluster" / "serve"
DEPLOYMENTS = {"Gateway", "Answerer", "Writer", "Registry"}
BUILDERS = {"kblam_ray.demo.application:build", "kblam_ray.serving.deployments.application:build"}


def check(config: dict[str, Any]) -> None:
    """Raise or assert where a Serve YAML is not what it seems: Serve's own schema lets much pass that does nothing."""
    ServeDeploySchema.model_validate(config)
    assert config.keys() <= ServeDeploySchema.model_fields.keys()
    assert config["http_options"].keys() <= {"host", "port", "root_path", "request_timeout_s", "keep_alive_timeout_s"}
    LoggingConfig.model_validate(config["logging_config"])
    assert config["logging_config"]["enable_access_log"] is False
    for app in config["applications"]:
        assert app.keys() <= ServeApplicationSchema.model_fields.keys()
        assert app["import_path"] in BUILDERS
        # Checks the numbers of replicas against each other, too.
        build(with_demo_model(ServeSettings.model_validate(app.get("args", {}))))
        for deployment in app.get("deployments", []):
            assert deployment.keys() <= DeploymentSchema.model_fields.keys()
            assert deployment["name"] in DEPLOYMENTS
            if "user_config" in deployment:
                assert deployment["name"] == "Registry"
                UserConfig.model_validate(deployment["user_config"])
            scaling = deployment.get("autoscaling_config", {})
            assert scaling.get("min_replicas", 1) <= scaling.get("max_replicas", 10**6)


def read(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((FOLDER / name).read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.yaml")))
def test_the_files_are_right(name):
    check(read(name))


def test_there_are_files():
    assert {path.name for path in FOLDER.glob("*")} == {"laptop.yaml", "s3-gpu.yaml"}


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("proxy_locatoin",), "HeadOnly"),
        (("http_options", "prot"), 8000),
        (("applications", 0, "arguments"), {}),
        (("applications", 0, "args", "replicas", "max_replica"), 3),
        (("applications", 0, "args", "replicas", "min_replicas"), 9),
        (("applications", 0, "deployments", 0, "user_confg"), {}),
        (("applications", 0, "deployments", 0, "name"), "Registrar"),
        (("applications", 0, "deployments", 0, "autoscaling_config"), {"min_replicas": 4, "max_replicas": 2}),
        (("applications", 0, "deployments", 0, "user_config", "knowledge_bases", "products"), {"url": "s3://b/kb"}),
    ],
)
def test_the_check_finds_what_serve_lets_pass(path, wrong):
    config = read("s3-gpu.yaml")
    place: Any = config
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = wrong
    with pytest.raises((AssertionError, ValidationError, InputError)):
        check(config)
