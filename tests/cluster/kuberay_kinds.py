"""The custom kinds that the manifests use, strictly: keys of KubeRay 1.6 and of the Prometheus operator, nothing else.

Neither project has its schemas in a Python package. Pod templates and services inside are checked as what they are, by
Kubernetes' own schema. What KubeRay's operator refuses beyond the schema is refused here, too.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

import kubernetes_validate
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)

KUBERNETES = "1.37"
"""Version whose schemas are used."""

RESOURCE_PARAMETERS = {"num-cpus", "num-gpus", "memory", "resources"}


def check_plain(document: dict[str, Any]) -> None:
    """Raises kubernetes_validate.ValidationError unless the API server would take it, unknown keys included."""
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def _pod_template(template: dict[str, Any]) -> dict[str, Any]:
    try:
        check_plain({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template})
    except kubernetes_validate.ValidationError as error:
        raise ValueError(f"{error.message} at {list(error.path)}") from None
    names = [container["name"] for container in template["spec"]["containers"]]
    assert len(names) == len(set(names)), names
    for container in template["spec"]["containers"]:
        given = [entry["name"] for entry in container.get("env", [])]
        assert len(given) == len(set(given)), given
        volumes = {volume["name"] for volume in template["spec"].get("volumes", [])}
        assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
    return template


def _resources(resources: dict[str, Any]) -> dict[str, Any]:
    template = {"spec": {"containers": [{"name": "x", "image": "x", "resources": resources}]}}
    _pod_template(template)
    return resources


def _label(name: str) -> str:
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > 41:
        raise ValueError(f"{name!r} is no name for a cluster: at most 41 small letters, digits and dashes")
    return name


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


PodTemplate = Annotated[dict[str, Any], AfterValidator(_pod_template)]
Parameters = dict[StrictStr, StrictStr]


class Metadata(Strict):
    name: Annotated[str, AfterValidator(_label)]
    namespace: str
    labels: dict[StrictStr, StrictStr] = {}
    annotations: dict[StrictStr, StrictStr] = {}


class AuthOptions(Strict):
    mode: Literal["disabled", "token"]
    secretName: str | None = None


class AutoscalerOptions(Strict):
    version: Literal["v1", "v2"] | None = None
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None
    idleTimeoutSeconds: PositiveInt | None = None
    resources: Annotated[dict[str, Any], AfterValidator(_resources)] | None = None
    image: str | None = None
    imagePullPolicy: Literal["Always", "IfNotPresent", "Never"] | None = None
    securityContext: dict[str, Any] | None = None
    env: list[dict[str, Any]] = []
    envFrom: list[dict[str, Any]] = []
    volumeMounts: list[dict[str, Any]] = []


class RedisCredential(Strict):
    value: str | None = None
    valueFrom: dict[str, Any] | None = None


class GcsFaultToleranceOptions(Strict):
    redisAddress: str
    redisUsername: RedisCredential | None = None
    redisPassword: RedisCredential | None = None
    externalStorageNamespace: str | None = None


class HeadGroup(Strict):
    template: PodTemplate
    rayStartParams: Parameters = {}
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] | None = None
    enableIngress: StrictBool | None = None
    headService: dict[str, Any] | None = None
    resources: Parameters = {}
    labels: Parameters = {}


class ScaleStrategy(Strict):
    workersToDelete: list[str] = []


class WorkerGroup(Strict):
    groupName: Annotated[str, AfterValidator(_label)]
    replicas: Annotated[StrictInt, Field(ge=0)] | None = None
    minReplicas: Annotated[StrictInt, Field(ge=0)]
    maxReplicas: Annotated[StrictInt, Field(ge=1)]
    template: PodTemplate
    rayStartParams: Parameters = {}
    idleTimeoutSeconds: PositiveInt | None = None
    numOfHosts: PositiveInt = 1
    scaleStrategy: ScaleStrategy | None = None
    resources: Parameters = {}
    labels: Parameters = {}

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        wanted = self.minReplicas if self.replicas is None else self.replicas
        if not self.minReplicas <= wanted <= self.maxReplicas:
            raise ValueError(
                f"{self.groupName}: replicas {wanted} are not from {self.minReplicas} to {self.maxReplicas}"
            )
        return self


class ClusterSpec(Strict):
    rayVersion: StrictStr
    authOptions: AuthOptions | None = None
    enableInTreeAutoscaling: StrictBool = False
    autoscalerOptions: AutoscalerOptions | None = None
    gcsFaultToleranceOptions: GcsFaultToleranceOptions | None = None
    headServiceAnnotations: Parameters = {}
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = []
    suspend: StrictBool = False
    managedBy: str | None = None

    @model_validator(mode="after")
    def _as_the_operator_wants_it(self) -> Self:
        names = [group.groupName for group in self.workerGroupSpecs]
        if len(names) != len(set(names)):
            raise ValueError(f"two groups of one name: {names}")
        if self.autoscalerOptions is not None and not self.enableInTreeAutoscaling:
            raise ValueError("options of an autoscaler that is off")
        groups: list[HeadGroup | WorkerGroup] = [self.headGroupSpec, *self.workerGroupSpecs]
        for group in groups:
            if "labels" in group.rayStartParams or (
                group.resources and RESOURCE_PARAMETERS & group.rayStartParams.keys()
            ):
                raise ValueError("resources or labels in two places")
            restart = group.template["spec"].get("restartPolicy", "Never")
            is_v2 = self.autoscalerOptions is not None and self.autoscalerOptions.version == "v2"
            if is_v2 and restart != "Never":
                raise ValueError("autoscaler v2 wants restartPolicy Never")
        for worker in self.workerGroupSpecs:
            if not self.enableInTreeAutoscaling and worker.replicas != worker.maxReplicas:
                raise ValueError(
                    f"{worker.groupName}: nothing scales it from {worker.replicas} to {worker.maxReplicas}"
                )
        return self


class RayCluster(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


class SubmitterConfig(Strict):
    backoffLimit: NonNegativeInt


class RayJobSpec(Strict):
    entrypoint: str = Field(min_length=1)
    rayClusterSpec: ClusterSpec | None = None
    clusterSelector: Parameters = {}
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = "K8sJobMode"
    submitterPodTemplate: PodTemplate | None = None
    submitterConfig: SubmitterConfig | None = None
    activeDeadlineSeconds: PositiveInt | None = None
    backoffLimit: NonNegativeInt = 0
    shutdownAfterJobFinishes: StrictBool = False
    ttlSecondsAfterFinished: NonNegativeInt = 0
    runtimeEnvYAML: str = ""
    metadata: Parameters = {}
    jobId: str | None = None
    entrypointNumCpus: float = 0
    entrypointNumGpus: float = 0
    entrypointResources: str | None = None
    suspend: StrictBool = False
    managedBy: str | None = None

    @model_validator(mode="after")
    def _as_the_operator_wants_it(self) -> Self:
        if bool(self.clusterSelector) == (self.rayClusterSpec is not None):
            raise ValueError("a cluster of its own, or a selector of one")
        if self.ttlSecondsAfterFinished and not self.shutdownAfterJobFinishes:
            raise ValueError("ttlSecondsAfterFinished without shutdownAfterJobFinishes")
        if self.submissionMode == "SidecarMode" and (self.submitterPodTemplate or self.submitterConfig):
            raise ValueError("SidecarMode takes no template of a submitter")
        if self.submitterPodTemplate is not None and self.submitterPodTemplate["spec"].get("restartPolicy") != "Never":
            raise ValueError("a submitter that is restarted would submit again")
        if self.runtimeEnvYAML and not isinstance(yaml.safe_load(self.runtimeEnvYAML), dict):
            raise ValueError("runtimeEnvYAML is no mapping")
        return self


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


class UpgradeStrategy(Strict):
    type: Literal["NewCluster", "None"]


class RayServiceSpec(Strict):
    serveConfigV2: str = Field(min_length=1)
    rayClusterConfig: ClusterSpec
    upgradeStrategy: UpgradeStrategy | None = None
    rayClusterDeletionDelaySeconds: NonNegativeInt | None = None
    excludeHeadPodFromServeSvc: StrictBool = False
    serveService: dict[str, Any] | None = None


class RayService(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec


class Selector(Strict):
    matchLabels: dict[StrictStr, StrictStr] = Field(min_length=1)


class MetricsEndpoint(Strict):
    port: str
    path: str = "/metrics"
    interval: str = Field("30s", pattern=r"^\d+s$")
    honorLabels: StrictBool = False


class PodMonitorSpec(Strict):
    selector: Selector
    podMetricsEndpoints: list[MetricsEndpoint] = Field(min_length=1)
    podTargetLabels: list[str] = []


class PodMonitor(Strict):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PodMonitor"]
    metadata: Metadata
    spec: PodMonitorSpec


class Annotations(Strict):
    summary: str
    description: str


class AlertLabels(Strict):
    severity: Literal["warning", "critical"]


class AlertRule(Strict):
    alert: str = Field(pattern=r"^Kblam[A-Za-z]+$")
    expr: str
    duration: str = Field("0s", alias="for", pattern=r"^\d+[smh]$")
    labels: AlertLabels
    annotations: Annotations


class RuleGroup(Strict):
    name: str
    rules: list[AlertRule] = Field(min_length=1)


class RuleSpec(Strict):
    groups: list[RuleGroup] = Field(min_length=1)


class PrometheusRule(Strict):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PrometheusRule"]
    metadata: Metadata
    spec: RuleSpec


CUSTOM: dict[str, type[Strict]] = {
    kind.__name__: kind for kind in (RayCluster, RayJob, RayService, PodMonitor, PrometheusRule)
}
