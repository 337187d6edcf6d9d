"""What several files in cluster/ must agree on: images, versions, names, ports, labels, secrets, sizes."""

from __future__ import annotations

import json
import re
import tomllib
from importlib.metadata import version

import pytest
import yaml

import kblam_ray
from kblam_ray.serving.settings import ServeSettings
from kblam_ray.table.pipeline.encode import ENCODER_CPUS
from tests.cluster.manifests import (
    CLUSTER,
    ROOT,
    Manifest,
    containers,
    documents,
    job_commands,
    kubernetes,
    named,
    parsed,
    pod_templates,
    quantity,
    ray_clusters,
    serve_config,
    walk,
)

IMAGE = f"registry.example.com/kblam-ray:{kblam_ray.__version__}"
PORTS = {"gcs-server": 6379, "dashboard": 8265, "metrics": 8080, "serve": 8000, "refresh": 9464}
ALLOCATABLE = 0.96
"""Share of a machine that Kubernetes leaves to pods, of CPUs and of memory, on machines of 16 CPUs and more."""


def guide() -> str:
    return (CLUSTER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path", sorted(path for path in CLUSTER.rglob("*") if path.suffix in (".yaml", ".json")), ids=lambda path: path.name
)
def test_every_file_can_be_read(path):
    if path.suffix == ".json":
        assert json.loads(path.read_text(encoding="utf-8"))
    else:
        assert documents(path)


def test_there_is_no_file_that_nothing_checks():
    names = {path.relative_to(CLUSTER).as_posix() for path in CLUSTER.rglob("*") if path.is_file()}
    folders = {"aws", "deepspeed", "kuberay", "monitoring", "serve", "train"}
    assert {name.partition("/")[0] for name in names if "/" in name} == folders
    assert {name for name in names if "/" not in name} == {"Dockerfile", "Dockerfile.dockerignore", "README.md"}
    assert all(name.endswith((".yaml", ".json")) for name in names if "/" in name)


def test_nothing_in_cluster_can_be_imported_and_nothing_imports_it():
    assert not list(CLUSTER.rglob("*.py"))
    for path in [*(ROOT / "kblam_ray").rglob("*.py"), *(ROOT / "jobs").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) cluster\b", text, re.MULTILINE), path


def test_one_image_of_this_version_everywhere():
    found = set()
    for path in CLUSTER.rglob("*"):
        if path.is_file():
            found |= set(re.findall(r"[\w.-]+/kblam-ray:[\w.-]+", path.read_text(encoding="utf-8")))
    assert found == {IMAGE, f"{IMAGE}-cpu"}


def test_gpus_get_the_image_with_cuda_and_no_other_worker_does():
    for manifest in kubernetes():
        for container in containers(manifest):
            has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
            if container["name"] == "ray-worker":
                assert container["image"] == (IMAGE if has_gpu else f"{IMAGE}-cpu"), manifest
    types = documents(CLUSTER / "aws" / "cluster.yaml")[0]["available_node_types"]
    assert {name for name, node in types.items() if "docker" in node} == {
        name for name, node in types.items() if node["resources"].get("GPU")
    }


def test_the_clusters_run_the_ray_that_the_image_installs():
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray==")
    )
    assert {cluster["rayVersion"] for _, cluster in ray_clusters()} == {pinned["ray"]} == {version("ray")}
    python = re.search(r"ARG PYTHON_VERSION=([\d.]+)", (CLUSTER / "Dockerfile").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert python
    assert project["requires-python"] == f">={python[1]}"


def test_all_objects_are_in_one_namespace():
    for manifest in kubernetes():
        metadata = manifest.content["metadata"]
        assert metadata.get("namespace", metadata["name"]) == "kblam", manifest


@pytest.mark.parametrize("manifest", kubernetes(), ids=str)
def test_ports_have_one_number_each(manifest: Manifest):
    for container in containers(manifest):
        for port in container.get("ports", []):
            assert PORTS[port["name"]] == port["containerPort"]
    policies = [value for path, value in walk(manifest.content) if path and path[-1] == "port"]
    if manifest.kind == "NetworkPolicy":
        assert set(policies) <= {*PORTS.values(), 53, 443, 6443}
    if manifest.kind == "PodMonitor":
        assert set(policies) <= PORTS.keys()


def test_the_servers_port_is_the_one_that_pods_open():
    assert serve_config()["http_options"] == {"host": "0.0.0.0", "port": PORTS["serve"]}
    launcher = documents(CLUSTER / "aws" / "cluster.yaml")[0]
    starts = " ".join([*launcher["head_start_ray_commands"], *launcher["worker_start_ray_commands"]])
    assert f"--dashboard-port={PORTS['dashboard']}" in starts
    assert starts.count(f"--metrics-export-port={PORTS['metrics']}") == 2
    assert f"--port={PORTS['gcs-server']}" in starts
    assert f"$RAY_HEAD_IP:{PORTS['gcs-server']}" in starts


def test_submitters_go_to_a_cluster_that_there_is():
    clusters = {manifest.name for manifest, _ in ray_clusters() if manifest.kind == "RayCluster"}
    addresses = {
        entry["value"]
        for manifest in kubernetes()
        for container in containers(manifest)
        for entry in container.get("env", [])
        if entry["name"] == "RAY_API_SERVER_ADDRESS"
    }
    assert addresses == {f"http://{name}-head-svc.kblam.svc:{PORTS['dashboard']}" for name in clusters}
    # KubeRay names the head's service after a RayCluster, and after a RayService.
    assert not clusters & {manifest.name for manifest in kubernetes() if manifest.kind == "RayService"}


def test_every_cluster_wants_the_token():
    tokens = {(cluster["authOptions"]["mode"], cluster["authOptions"]["secretName"]) for _, cluster in ray_clusters()}
    assert tokens == {("token", "kblam-ray-token")}
    for manifest in kubernetes():
        for container in containers(manifest):
            env = {entry["name"]: entry for entry in container.get("env", [])}
            if "RAY_API_SERVER_ADDRESS" in env:
                assert env["RAY_AUTH_MODE"]["value"] == "token"
                assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {
                    "name": "kblam-ray-token",
                    "key": "auth_token",
                }


def test_the_guide_makes_every_secret_and_no_file_holds_one():
    wanted = {
        (value["name"], value["key"])
        for manifest in kubernetes()
        for path, value in walk(manifest.content)
        if path and path[-1] == "secretKeyRef"
    }
    made = {
        (name, key)
        for name, rest in re.findall(r"create secret generic ([\w-]+)((?:[^\n]*\\\n)*[^\n]*)", guide())
        for key in re.findall(r"--from-(?:literal|file)=([\w-]+)=", rest)
    }
    assert wanted == made
    assert not [manifest for manifest in kubernetes() if manifest.kind == "Secret"]
    for manifest in kubernetes():
        for container in containers(manifest):
            for entry in container.get("env", []):
                assert ("valueFrom" in entry) == bool(re.search(r"TOKEN$|KEYS?$", entry["name"])), entry["name"]


def test_accounts_claims_and_labels_that_are_named_are_there():
    names = {(manifest.kind, manifest.name) for manifest in kubernetes()}
    labels = {
        (key, value)
        for manifest in kubernetes()
        for _, template in pod_templates(manifest)
        for key, value in template["metadata"].get("labels", {}).items()
    }
    for manifest in kubernetes():
        for path, value in walk(manifest.content):
            if path and path[-1] == "serviceAccountName":
                assert ("ServiceAccount", value) in names
            if path and path[-1] == "claimName":
                assert ("PersistentVolumeClaim", value) in names
            if path and path[-1] == "matchLabels" and "namespaceSelector" not in path:
                # Those of KubeRay itself are not in templates.
                assert set(value.items()) <= labels | {("ray.io/is-ray-node", "yes"), ("ray.io/node-type", "head")}


def test_only_a_head_that_scales_its_cluster_may_use_kubernetes():
    for _, cluster in ray_clusters():
        head = cluster["headGroupSpec"]["template"]["spec"]
        assert head.get("automountServiceAccountToken", True) is cluster.get("enableInTreeAutoscaling", False)
    for manifest in kubernetes():
        for path, template in pod_templates(manifest):
            if "headGroupSpec" not in path:
                assert template["spec"]["automountServiceAccountToken"] is False, (manifest, path)


def test_the_server_scales_as_its_replicas_do():
    (app,) = serve_config()["applications"]
    settings = ServeSettings.model_validate(app["args"])
    (group,) = named("RayService", "kblam-server")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (
        settings.replicas.min_replicas,
        settings.replicas.max_replicas,
    )
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert settings.replicas.num_gpus == int(limits["nvidia.com/gpu"])
    assert settings.replicas.num_cpus <= quantity(limits["cpu"])


def test_answers_that_were_begun_are_finished():
    (app,) = serve_config()["applications"]
    limits = ServeSettings.model_validate(app["args"]).limits
    service = named("RayService", "kblam-server")["spec"]
    (group,) = service["rayClusterConfig"]["workerGroupSpecs"]
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > limits.drain_timeout_s
    assert service["rayClusterDeletionDelaySeconds"] >= limits.drain_timeout_s + limits.request_timeout_s


def test_versions_are_kept_equally_long_by_all_that_remove_files():
    found = set(re.findall(r"--retention-h[ =](\d+)", " ".join(yaml.safe_dump(one.content) for one in kubernetes())))
    assert found == {"720"}
    assert "30 days" in guide()
    for kind, name in (("CronJob", "kblam-refresh"), ("Deployment", "kblam-watch"), ("CronJob", "kblam-compact")):
        assert "--retention-h" in yaml.safe_dump(named(kind, name))


def test_a_job_that_is_stopped_may_finish_what_it_has_begun():
    from kblam_ray.table.refresh.settings import RefreshSettings

    head = named("RayCluster", "kblam-jobs")["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    (wait_s,) = [float(entry["value"]) for entry in head["env"] if entry["name"] == "RAY_JOB_STOP_WAIT_TIME_S"]
    assert wait_s > RefreshSettings.model_fields["stop_s"].default
    watcher = named("Deployment", "kblam-watch")["spec"]["template"]["spec"]
    assert watcher["terminationGracePeriodSeconds"] > wait_s


def test_the_server_finds_its_adapter_and_its_keys():
    (app,) = serve_config()["applications"]
    service = named("RayService", "kblam-server")["spec"]["rayClusterConfig"]
    for group in (service["headGroupSpec"], *service["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert app["args"]["adapter"].startswith("/mnt/adapters/")
        assert mounts["/mnt/adapters"]["readOnly"] is True
        assert {"KBLAM_API_KEYS", "KBLAM_ADMIN_KEYS"} <= {entry["name"] for entry in container["env"]}
        assert {entry["name"]: entry for entry in container["env"]}["HF_HOME"]["value"] in mounts
    train = named("RayJob", "kblam-train")["spec"]
    assert " --output /mnt/adapters/" in train["entrypoint"]


def test_the_server_serves_what_the_training_makes():
    """Adapter and base model: an adapter is refused on another model than its own, and a folder that is not there."""
    (app,) = serve_config()["applications"]
    ((job, arguments),) = job_commands(named("RayJob", "kblam-train")["spec"]["entrypoint"])
    training = parsed(job, arguments)
    assert app["args"]["base_model"] == training.base_model
    assert app["args"]["adapter"] == training.output
    # The commands of the guide that name an adapter on the volume mean the same.
    text = guide().replace("\\\n", " ")
    for line in text.splitlines():
        if line.startswith("python ") and "--adapter" in line:
            assert f"--base-model {training.base_model} --adapter {training.output} " in line
    (registry,) = app["deployments"]
    served = {one["uri"] for one in registry["user_config"]["knowledge_bases"].values()}
    assert set(training.kb) <= served


def is_of_ray(labels: dict[str, str]) -> bool:
    """Whether a selector means pods that a RayCluster owns."""
    groups = [
        group for _, cluster in ray_clusters() for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]
    return any(key.startswith("ray.io/") for key in labels) or any(
        labels.items() <= group["template"]["metadata"]["labels"].items() for group in groups
    )


def test_budgets_over_pods_of_ray_are_ones_that_kubernetes_can_count():
    """Of a RayCluster it cannot learn how many pods there should be, which anything but an integer minimum needs."""
    budgets = {one.name: one.content["spec"] for one in kubernetes() if one.kind == "PodDisruptionBudget"}
    assert budgets
    for name, spec in budgets.items():
        assert is_of_ray(spec["selector"]["matchLabels"]), name
        assert "maxUnavailable" not in spec, name
        assert type(spec["minAvailable"]) is int, name
    (group,) = named("RayService", "kblam-server")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    # A higher minimum than there may be pods would hold every drain up.
    assert 1 <= budgets["kblam-answerers"]["minAvailable"] <= group["minReplicas"]
    assert budgets["kblam-heads"]["minAvailable"] >= 10 * len(ray_clusters())


def test_a_job_that_has_ended_is_started_again_by_replacing_it():
    """`kubectl apply` of what is there changes nothing."""
    for manifest in kubernetes():
        if manifest.kind == "RayJob":
            command = f"#   kubectl replace --force -f {manifest.path.relative_to(ROOT)}\n"
            assert command in manifest.path.read_text(encoding="utf-8"), manifest
    assert "kubectl replace --force -f" in guide()


def test_an_encoder_takes_what_the_refreshs_comment_says():
    text = (CLUSTER / "kuberay" / "refresh.yaml").read_text(encoding="utf-8").partition("apiVersion")[0]
    found = re.search(r"one takes ([\d.]+) CPU: (\d+) take (\d+) of the (\d+) x (\d+) = (\d+) CPUs", text)
    assert found
    each, count, taken, pods, cpus, most = map(float, found.groups())
    (group,) = named("RayCluster", "kblam-jobs")["spec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (each, taken, most) == (ENCODER_CPUS, each * count, pods * cpus)
    assert (pods, cpus) == (group["maxReplicas"], quantity(limits["cpu"]))
    assert f"--num-workers={count:g}\n" in (CLUSTER / "kuberay" / "refresh.yaml").read_text(encoding="utf-8")


def test_shared_memory_and_memory_fit_into_the_pods():
    for manifest in kubernetes():
        for _, template in pod_templates(manifest):
            spec = template["spec"]
            for volume in spec.get("volumes", []):
                if volume.get("emptyDir", {}).get("medium") == "Memory":
                    memory = quantity(spec["containers"][0]["resources"]["limits"]["memory"])
                    assert quantity(volume["emptyDir"]["sizeLimit"]) <= 0.35 * memory


def test_pods_fit_onto_the_machines_that_they_ask_for():
    from moto.ec2.models.instance_types import INSTANCE_TYPES  # as EC2 describes them

    wanted = [
        (template["spec"]["nodeSelector"]["node.kubernetes.io/instance-type"], template["spec"]["containers"])
        for manifest in kubernetes()
        for _, template in pod_templates(manifest)
        if "nodeSelector" in template["spec"]
    ]
    assert len(wanted) == 4
    for name, (container,) in wanted:
        machine, limits = INSTANCE_TYPES[name], container["resources"]["limits"]
        assert quantity(limits["cpu"]) <= ALLOCATABLE * machine["VCpuInfo"]["DefaultVCpus"]
        assert quantity(limits["memory"]) <= ALLOCATABLE * machine["MemoryInfo"]["SizeInMiB"] * 2**20
        gpus = sum(gpu["Count"] for gpu in machine.get("GpuInfo", {}).get("Gpus", []))
        assert int(limits.get("nvidia.com/gpu", 0)) <= gpus


def test_buckets_and_tables_have_the_same_names_everywhere():
    tables = set(re.findall(r"s3://[\w./-]+", " ".join(yaml.safe_dump(one.content) for one in kubernetes())))
    assert all(uri.startswith("s3://my-bucket/") for uri in tables)
    (app,) = serve_config()["applications"]
    (registry,) = app["deployments"]
    served = registry["user_config"]["knowledge_bases"]["products"]["uri"]
    for kind, name in (("CronJob", "kblam-refresh"), ("CronJob", "kblam-compact"), ("Deployment", "kblam-watch")):
        assert served in yaml.safe_dump(named(kind, name), width=10**6)
