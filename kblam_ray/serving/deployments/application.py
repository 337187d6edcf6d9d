"""The Serve application of a server's settings: gateways, answerers, a writer and a registry."""

from pathlib import PurePosixPath
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.deployment import Application
from ray.serve.schema import LoggingConfig

from kblam_ray.errors import InputError
from kblam_ray.serving.deployments.answerer import AnswererDeployment
from kblam_ray.serving.deployments.gateway import GatewayDeployment
from kblam_ray.serving.deployments.registry import RegistryDeployment
from kblam_ray.serving.deployments.tables import tables_of
from kblam_ray.serving.deployments.writer import WriterDeployment
from kblam_ray.serving.http.access import Keys
from kblam_ray.serving.settings import ReplicaSettings, ServeSettings

# Annotations are not postponed here: Serve looks at `build`'s to turn the YAML's `args` into settings.

MANY_REQUESTS = 10_000
"""At a time, where the limit is somewhere else."""

HEALTH_CHECK_S = 1.0
"""How often Serve looks whether a process is well; it replaces one that died within a few of these."""

STOP_S = 5.0
"""What a process may take to stop after its last request."""

LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)
"""Access logs are ours: they carry request ids."""


def build(settings: ServeSettings) -> Application:
    """The application; `import_path` of a Serve YAML, whose `args` are the settings.

    Keys are read from the environment of the process that builds; only their hashes go further.

    Raises:
        InputError: settings that contradict each other, no model, two knowledge bases of one name.
    """
    require_model(settings)
    limits, replicas = settings.limits, settings.replicas
    common: dict[str, Any] = {
        "health_check_period_s": HEALTH_CHECK_S,
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": limits.drain_timeout_s + STOP_S,
        "logging_config": LOGGING,
    }
    # What only passes messages on shares the cores with the answerers.
    light = {**common, "ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": MANY_REQUESTS}
    registry = serve.deployment(
        RegistryDeployment, name="Registry", user_config={"knowledge_bases": {}}, health_check_timeout_s=5, **light
    ).bind(settings, tables_of(settings.kb))
    writer = serve.deployment(WriterDeployment, name="Writer", **light).bind(settings, registry)
    answerers = serve.deployment(
        AnswererDeployment,
        name="Answerer",
        # What the gateways let in, all of them at once, waits for a replica here; the limit itself is theirs.
        max_ongoing_requests=limits.max_ongoing_requests,
        max_queued_requests=_largest_queue(settings),
        ray_actor_options={"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus},
        **_num_replicas(replicas),
        **common,
    ).bind(settings, registry)
    gateway = serve.deployment(
        serve.ingress()(GatewayDeployment), name="Gateway", num_replicas=replicas.gateways, **light
    )
    return gateway.bind(settings, model_name(settings), answerers, writer, registry, Keys.from_environment())


def model_name(settings: ServeSettings) -> str:
    """What clients call the model: what the settings say, else the last part of the base model's or bundle's name."""
    named = settings.model_name or PurePosixPath(settings.bundle or settings.base_model or "").name
    if ":" in named:
        raise InputError(
            f"{named!r} cannot name a model: a colon parts it from the knowledge base",
            where="model_name",
            help="choose a name without a colon",
        )
    return named


def require_model(settings: ServeSettings) -> None:
    """Raises InputError unless the settings name one model, and a name for it."""
    pair = (settings.base_model, settings.adapter)
    if settings.bundle is not None and any(pair):
        raise InputError("a bundle and a model beside it", where="bundle", help="give one of them")
    if settings.bundle is None and not all(pair):
        raise InputError(
            "no model is named", where="base_model, adapter", help="give a bundle, or a base model and an adapter"
        )
    model_name(settings)


def _largest_queue(settings: ServeSettings) -> int:
    largest = max(settings.replicas.min_replicas, settings.replicas.max_replicas)
    return settings.limits.max_queued_requests + largest * settings.limits.max_ongoing_requests


def _num_replicas(replicas: ReplicaSettings) -> dict[str, Any]:
    fewest, most = replicas.min_replicas, replicas.max_replicas
    if "max_replicas" not in replicas.model_fields_set:
        most = max(fewest, most)
    if fewest > most:
        raise InputError(
            f"at least {fewest} replicas and at most {most}",
            where="replicas.min_replicas, replicas.max_replicas",
            help="let the most be no fewer than the fewest",
        )
    if fewest == most:
        return {"num_replicas": fewest}
    scaling = AutoscalingConfig(
        min_replicas=fewest,
        max_replicas=most,
        target_ongoing_requests=replicas.target_ongoing_requests,
        upscale_delay_s=replicas.upscale_delay_s,
        downscale_delay_s=replicas.downscale_delay_s,
    )
    return {"autoscaling_config": scaling}
