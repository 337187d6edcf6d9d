"""What the schemas let pass and a cluster would not: schedules, ways through the network, mounts, leftovers."""

from __future__ import annotations

import re
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from tests.cluster.manifests import (
    CLUSTER,
    Manifest,
    containers,
    documents,
    job_commands,
    kubernetes,
    named,
    parsed,
    pod_templates,
    ray_clusters,
    serve_config,
)
from tests.cluster.test_cluster_commands import comment_commands, texts_of
from tests.cluster.test_cluster_consistency import IMAGE, PORTS, guide

RAY_NODE = {"ray.io/is-ray-node": "yes"}
"""What KubeRay labels the pods of a cluster with."""

RANGES = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
"""Of the five parts of a schedule."""


def ray_pods() -> list[tuple[str, dict[str, Any]]]:
    """The pod templates of all heads and groups of workers, with what each is."""
    return [
        (f"{manifest.name}/{group.get('groupName', 'head')}", group["template"])
        for manifest, cluster in ray_clusters()
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]


RAY_PODS = ray_pods()


def test_every_image_has_its_tag():
    images = {container["image"] for manifest in kubernetes() for container in containers(manifest)}
    assert images == {IMAGE, f"{IMAGE}-cpu"}
    launcher = documents(CLUSTER / "aws" / "cluster.yaml")[0]
    assert launcher["docker"]["image"] == f"{IMAGE}-cpu"
    assert launcher["available_node_types"]["trainer"]["docker"]["worker_image"] == IMAGE


def test_a_head_that_a_person_starts_wants_the_token_and_gets_it():
    """`ray start` turns tokens on where it finds one; `serve deploy` shows one only if the environment says so."""
    lines = comment_commands(CLUSTER / "serve" / "laptop.yaml")
    names = [" ".join(line.split("#")[0].split()[:2]) for line in lines]
    assert names == ["ray get-auth-token", "export RAY_AUTH_MODE=token", "ray start", "serve deploy", "serve status"]


def is_schedule(text: str) -> bool:
    """Whether Kubernetes takes a schedule of numbers, ranges, lists and steps."""
    fields = text.split()
    return len(fields) == len(RANGES) and all(
        (found := re.fullmatch(r"(\*|\d+(?:-\d+)?)(?:/([1-9]\d*))?", part)) is not None
        and (found[1] == "*" or all(least <= int(number) <= most for number in found[1].split("-")))
        for field, (least, most) in zip(fields, RANGES, strict=True)
        for part in field.split(",")
    )


@pytest.mark.parametrize("wrong", ["20 2 * *", "80 2 * * *", "*/0 * * * *", "20 2 * * mon-"])
def test_the_check_of_schedules_finds_what_is_wrong(wrong):
    assert not is_schedule(wrong)


def test_schedules_are_ones_and_do_not_run_into_themselves():
    jobs = [manifest.content["spec"] for manifest in kubernetes() if manifest.kind == "CronJob"]
    assert jobs
    for job in jobs:
        assert is_schedule(job["schedule"])
        assert job["timeZone"] == "Etc/UTC"  # without it the controller's own zone counts, whatever that is
        assert job["concurrencyPolicy"] == "Forbid"


def test_all_jobs_mean_the_table_that_is_served_and_the_exports_that_are_embedded():
    (app,) = serve_config()["applications"]
    served = app["deployments"][0]["user_config"]["knowledge_bases"]["products"]["uri"]
    found = [command for manifest in kubernetes() for text in texts_of(manifest) for command in job_commands(text)]
    settings = [parsed(job, arguments) for job, arguments in found]
    assert len(settings) == 5
    for one in settings:
        assert one.kb in (served, [served])
    (sources,) = {tuple(one.input) for one in settings if hasattr(one, "input")}
    assert sources


def test_clusters_of_jobs_go_with_them_and_no_job_runs_for_ever():
    jobs = [manifest.content["spec"] for manifest in kubernetes() if manifest.kind == "RayJob"]
    assert jobs
    for job in jobs:
        assert job["shutdownAfterJobFinishes"] is True
        assert job["activeDeadlineSeconds"] > 0


def test_a_new_release_comes_up_beside_the_one_that_answers():
    """As "Upgrades" of the guide says; without it the service would go on with the old release for ever."""
    service = named("RayService", "kblam-server")["spec"]
    assert service["upgradeStrategy"] == {"type": "NewCluster"}
    assert service["rayClusterConfig"]["headGroupSpec"]["template"]["metadata"]["annotations"].keys() == {
        "kblam-ray/release"
    }


def test_heads_take_no_work():
    for manifest, cluster in ray_clusters():
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", manifest


@pytest.mark.parametrize(("name", "template"), RAY_PODS)
def test_rays_objects_and_the_hubs_files_have_their_places(name, template):
    """Without a volume in memory /dev/shm has 64 MB, and the container's own disk would hold the models."""
    (container,) = template["spec"]["containers"]
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert "persistentVolumeClaim" in volumes[mounts[environment["HF_HOME"]]["name"]]


def test_one_path_is_one_folder_of_the_shared_volume_in_all_pods():
    shared = [
        (mount["mountPath"], mount["subPath"], mount.get("readOnly", False), name)
        for name, template in RAY_PODS
        for mount in template["spec"]["containers"][0]["volumeMounts"]
        if "subPath" in mount
    ]
    assert {(path, folder) for path, folder, _, _ in shared} == {("/mnt/hub", "hub"), ("/mnt/adapters", "adapters")}
    for path, _, is_read_only, name in shared:
        assert is_read_only is (path == "/mnt/adapters" and name.startswith("kblam-server/")), name
    assert named("PersistentVolumeClaim", "kblam-models")["spec"]["accessModes"] == ["ReadWriteMany"]


def test_pods_with_gpus_are_let_onto_the_machines_that_have_them():
    with_gpu = [
        (name, template["spec"])
        for name, template in RAY_PODS
        if "nvidia.com/gpu" in template["spec"]["containers"][0]["resources"]["limits"]
    ]
    assert [name for name, _ in with_gpu] == ["kblam-server/answerers", "kblam-train/trainers"]
    for name, spec in with_gpu:
        assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in spec["tolerations"], name


def test_what_is_watched_has_one_name():
    (container,) = named("Deployment", "kblam-watch")["spec"]["template"]["spec"]["containers"]
    text = " ".join([*container["args"], " ".join(container["lifecycle"]["preStop"]["exec"]["command"]), guide()])
    ids = re.findall(r"ray job (stop|delete|submit --submission-id|logs) (watch[\w-]*)", text)
    assert {what for what, _ in ids} == {"stop", "delete", "submit --submission-id", "logs"}
    assert {name for _, name in ids} == {"watch-products"}


def test_the_namespace_refuses_pods_with_privileges():
    assert named("Namespace", "kblam")["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}


def test_the_guide_names_the_servers_port():
    ports = re.findall(r"serve-svc(?: |\.kblam\.svc:)(\d+)", guide())
    assert ports == [str(PORTS["serve"])] * 2


def rules_for(labels: dict[str, str], direction: str) -> list[dict[str, Any]]:
    """The rules of all policies that select a pod."""
    policies = [one.content["spec"] for one in kubernetes() if one.kind == "NetworkPolicy"]
    chosen = [one for one in policies if one["podSelector"]["matchLabels"].items() <= labels.items()]
    assert all({"Ingress", "Egress"} == set(one["policyTypes"]) for one in chosen)
    assert chosen
    return [rule for one in chosen for rule in one.get(direction, [])]


def lets(labels: dict[str, str], direction: str, port: int, **peer: str | dict[str, str]) -> bool:
    """Whether a pod with these labels may be reached by, or reach, a peer: a `pod`, a `namespace` or an `address`."""
    for rule in rules_for(labels, direction):
        if port not in [one["port"] for one in rule.get("ports", [{"port": port}])]:
            continue
        for other in rule["from" if direction == "ingress" else "to"]:
            if "pod" in peer and "podSelector" in other:
                if other["podSelector"]["matchLabels"].items() <= dict(peer["pod"]).items():
                    return True
            elif "namespace" in peer and "namespaceSelector" in other:
                ((key, value),) = other["namespaceSelector"]["matchLabels"].items()
                if peer["namespace"] in (key, value):
                    return True
            elif "address" in peer and "ipBlock" in other:
                address, block = ip_address(str(peer["address"])), other["ipBlock"]
                if address in ip_network(block["cidr"]) and not any(
                    address in ip_network(hole) for hole in block.get("except", [])
                ):
                    return True
    return False


def submitters() -> list[tuple[Manifest, dict[str, str]]]:
    """Every pod that runs `ray job submit`, with its labels."""
    return [
        (manifest, template["metadata"]["labels"])
        for manifest in kubernetes()
        for path, template in pod_templates(manifest)
        if "submitterPodTemplate" in path or manifest.kind in ("CronJob", "Deployment")
    ]


def test_what_must_talk_to_each_other_may():
    assert len(submitters()) == 5
    for manifest, labels in submitters():
        assert lets(RAY_NODE, "ingress", PORTS["dashboard"], pod=labels), manifest
        assert lets(labels, "egress", PORTS["dashboard"], pod=RAY_NODE), manifest
        assert lets(labels, "egress", 53, namespace="kube-system"), manifest
    for port in (PORTS["gcs-server"], 40000):
        assert lets(RAY_NODE, "ingress", port, pod=RAY_NODE)
        assert lets(RAY_NODE, "egress", port, pod=RAY_NODE)
    for port in (PORTS["dashboard"], PORTS["serve"]):
        assert lets(RAY_NODE, "ingress", port, namespace="kuberay-system")
    assert lets(RAY_NODE, "ingress", PORTS["serve"], namespace="kblam-ray/clients")
    monitors = [one.content["spec"] for one in kubernetes() if one.kind == "PodMonitor"]
    for port in (target["port"] for monitor in monitors for target in monitor["podMetricsEndpoints"]):
        assert lets(RAY_NODE, "ingress", PORTS[port], namespace="monitoring"), port
    assert lets(RAY_NODE, "egress", 53, namespace="kube-system")
    assert lets(RAY_NODE, "egress", 443, address="52.216.0.1")


def test_what_must_not_talk_to_rays_ports_may_not():
    for port in (PORTS["gcs-server"], PORTS["dashboard"]):
        for namespace in ("kblam-ray/clients", "monitoring", "default"):
            assert not lets(RAY_NODE, "ingress", port, namespace=namespace)
        assert not lets(RAY_NODE, "ingress", port, pod={"app": "another"})
    for _, labels in submitters():
        assert not lets(RAY_NODE, "ingress", PORTS["gcs-server"], pod=labels)
    for port in (80, 443):
        assert not lets(RAY_NODE, "egress", port, address="169.254.169.254")
