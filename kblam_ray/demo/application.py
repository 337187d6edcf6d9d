"""A server of the model that comes with the package: for `jobs/serve.py` where no model is named, and for Serve YAML.

import_path: kblam_ray.demo.application:build
args: {kb: [world=demo-kb/world]}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kblam_ray.demo.shipped import ADAPTER, BASE_MODEL
from kblam_ray.serving.settings import ServeSettings

if TYPE_CHECKING:
    from ray.serve.deployment import Application

MODEL_NAME = "kblam-demo"


def with_demo_model(settings: ServeSettings) -> ServeSettings:
    """The settings with the demo's base model and adapter where no model is named."""
    if settings.bundle or settings.base_model or settings.adapter:
        return settings
    model = {"base_model": str(BASE_MODEL), "adapter": str(ADAPTER), "model_name": settings.model_name or MODEL_NAME}
    return settings.model_copy(update=model)


def build(args: dict[str, Any]) -> Application:
    """The application of `args`, which are `ServeSettings`, with the demo's model where they name none."""
    from kblam_ray.serving.deployments.application import build

    return build(with_demo_model(ServeSettings.model_validate(args)))
