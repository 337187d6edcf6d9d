"""Serve knowledge bases: OpenAI-compatible answers over HTTP, from tables that may change while they are served.

    python jobs/serve.py --kb kb/world
    python jobs/serve.py --kb world=s3://bucket/kb --base-model models/llama --adapter adapters/world --port 8080
    python jobs/serve.py --config serve.yaml --host 0.0.0.0 --state-uri s3://bucket/state.json

Runs until SIGTERM or Ctrl-C; then running requests are finished and new ones turned away. Listens beyond this machine
only with keys in KBLAM_API_KEYS (to ask) and KBLAM_ADMIN_KEYS (to write). With neither `--base-model` nor `--adapter`
the small model and adapter answer that come with the package. The summary has `address`, `requests`, `unfinished` and
`knowledge_bases`.
"""

import importlib.util
from typing import Any

from kblam_ray.demo.application import with_demo_model
from kblam_ray.errors import MissingDependencyError
from kblam_ray.job import main
from kblam_ray.serving.settings import ServeSettings


def serve(settings: ServeSettings) -> dict[str, Any]:
    settings = with_demo_model(settings)
    for package in ("ray", "fastapi", "prometheus_client", "torch", "transformers"):
        # Looked for, not imported: this process answers nothing itself.
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(f"serving needs the package {package}", help='pip install "kblam-ray[serve]"')
    from kblam_ray.serving.job import serve

    return serve(settings)


if __name__ == "__main__":
    main("serve", ServeSettings, serve)
