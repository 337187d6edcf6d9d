"""Every Kubernetes object is what the API server and the operators take: misspelt keys, wrong types, bad numbers."""

from __future__ import annotations

import copy
from typing import Any

import kubernetes_validate
import pytest
from pydantic import ValidationError

from tests.cluster.kuberay_kinds import CUSTOM, check_plain
from tests.cluster.manifests import Manifest, containers, kubernetes, named, pod_templates, ray_clusters
from tests.serving.test_deployments_yaml import check as check_serve_config
from tests.serving.test_deployments_yaml import read as read_serve_config

MANIFESTS = kubernetes()


def check(content: dict[str, Any]) -> None:
    """Raise where an object would be refused, or taken and something of it ignored."""
    if content["kind"] in CUSTOM:
        CUSTOM[content["kind"]].model_validate(content)
    else:
        check_plain(content)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=str)
def test_the_objects_are_right(manifest: Manifest):
    check(manifest.content)


def test_what_there_is():
    assert sorted((one.kind, one.name) for one in MANIFESTS) == [
        ("CronJob", "kblam-compact"),
        ("CronJob", "kblam-refresh"),
        ("Deployment", "kblam-watch"),
        ("Namespace", "kblam"),
        ("NetworkPolicy", "kblam-ray-nodes"),
        ("NetworkPolicy", "kblam-submitters"),
        ("PersistentVolumeClaim", "kblam-models"),
        ("PodDisruptionBudget", "kblam-answerers"),
        ("PodDisruptionBudget", "kblam-heads"),
        ("PodMonitor", "kblam-ray-nodes"),
        ("PodMonitor", "kblam-refresh"),
        ("PodMonitor", "kblam-server"),
        ("PrometheusRule", "kblam"),
        ("RayCluster", "kblam-jobs"),
        ("RayJob", "kblam-embed"),
        ("RayJob", "kblam-train"),
        ("RayService", "kblam-server"),
        ("ServiceAccount", "kblam-head"),
        ("ServiceAccount", "kblam-worker"),
    ]


@pytest.mark.parametrize(
    ("kind", "name", "path", "wrong"),
    [
        ("RayCluster", "kblam-jobs", ("spec", "enableIntreeAutoscaling"), True),
        ("RayCluster", "kblam-jobs", ("spec", "enableInTreeAutoscaling"), False),
        ("RayCluster", "kblam-jobs", ("spec", "workerGroupSpecs", 0, "maxReplicas"), 0),
        ("RayCluster", "kblam-jobs", ("spec", "workerGroupSpecs", 0, "replicas"), 99),
        ("RayCluster", "kblam-jobs", ("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        ("RayCluster", "kblam-jobs", ("spec", "headGroupSpec", "template", "spec", "containers", 0, "imgae"), "x"),
        ("RayCluster", "kblam-jobs", ("spec", "headGroupSpec", "template", "spec", "volumes"), []),
        ("RayCluster", "kblam-jobs", ("spec", "autoscalerOptions", "version"), "v3"),
        ("RayCluster", "kblam-jobs", ("metadata", "name"), "Kblam_Jobs"),
        ("RayJob", "kblam-embed", ("spec", "entrypont"), "x"),
        ("RayJob", "kblam-embed", ("spec", "shutdownAfterJobFinishes"), False),
        ("RayJob", "kblam-embed", ("spec", "clusterSelector"), {"ray.io/cluster": "kblam-jobs"}),
        ("RayJob", "kblam-embed", ("spec", "submitterPodTemplate", "spec", "restartPolicy"), "OnFailure"),
        ("RayService", "kblam-server", ("spec", "rayClusterSpec"), {}),
        ("RayService", "kblam-server", ("spec", "upgradeStrategy", "type"), "Rolling"),
        ("CronJob", "kblam-refresh", ("spec", "concurencyPolicy"), "Forbid"),
        ("CronJob", "kblam-refresh", ("spec", "schedule"), 15),
        ("NetworkPolicy", "kblam-ray-nodes", ("spec", "ingress", 0, "form"), []),
        ("PodDisruptionBudget", "kblam-heads", ("spec", "minAvailabe"), 1),
        ("PodMonitor", "kblam-server", ("spec", "podMetricsEndpoints", 0, "honourLabels"), True),
        ("PrometheusRule", "kblam", ("spec", "groups", 0, "rules", 0, "labels", "severity"), "page"),
    ],
)
def test_the_check_finds_what_is_wrong(kind, name, path, wrong):
    content = copy.deepcopy(named(kind, name))
    place: Any = content
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = wrong
    with pytest.raises((ValidationError, kubernetes_validate.ValidationError)):
        check(content)


def test_the_servers_config_is_the_one_of_cluster_serve():
    import yaml

    config = yaml.safe_load(named("RayService", "kblam-server")["spec"]["serveConfigV2"])
    check_serve_config(config)
    assert config == read_serve_config("s3-gpu.yaml")


@pytest.mark.parametrize("manifest", MANIFESTS, ids=str)
def test_pods_keep_to_the_restricted_standard(manifest: Manifest):
    """Which the namespace enforces: a pod that does not is never started."""
    for _, template in pod_templates(manifest):
        spec = template["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert spec["securityContext"]["runAsUser"] == 1000
        assert all(volume.keys() & {"emptyDir", "persistentVolumeClaim"} for volume in spec.get("volumes", []))
    contexts = [container["securityContext"] for container in containers(manifest)]
    for candidate, cluster in ray_clusters():
        if candidate == manifest and "autoscalerOptions" in cluster:
            contexts.append(cluster["autoscalerOptions"]["securityContext"])
    for context in contexts:
        assert context["allowPrivilegeEscalation"] is False
        assert context["runAsNonRoot"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}


@pytest.mark.parametrize("manifest", MANIFESTS, ids=str)
def test_every_container_says_what_it_takes(manifest: Manifest):
    for container in containers(manifest):
        resources = container["resources"]
        assert {"cpu", "memory"} <= resources["limits"].keys()
        # Ray counts the limit as the node's: a smaller request would promise cores that are not there.
        if container["name"].startswith("ray-") and container["name"] != "ray-job-submitter":
            assert resources["requests"] == resources["limits"]
