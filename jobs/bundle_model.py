"""Put base model, adapter and a knowledge base's version into one folder that loads back in one call.

    python jobs/bundle_model.py --base-model models/llama --adapter adapters/world --kb kb/world --output bundles/world
    python jobs/ask.py --bundle bundles/world --question "Who founded Ur?"

With neither `--base-model` nor `--adapter` the small model and adapter are bundled that come with the package.
The table stays where it is. `knowledge_model.json` in the folder names it: for another version edit that line.
"""

from typing import Any

from pydantic import Field

from kblam_ray.errors import InputError, MissingDependencyError
from kblam_ray.job import JobConfig, main


class BundleSettings(JobConfig):
    """What `jobs/bundle_model.py` takes."""

    base_model: str | None = Field(None, description="base model: a folder or a name on the hub; the demo's")
    adapter: str | None = Field(None, description="knowledge adapter: a folder or a name on the hub; the demo's")
    kb: str = Field(description="the table: a local path or s3://bucket/prefix")
    kb_version: int | None = Field(None, ge=0, description="version of the table: the newest unless given")
    follow: bool = Field(False, description="name no version: the bundle always loads the newest")
    output: str = Field(description="the folder to make")
    copy_base: bool = Field(True, description="copy the base model's files; otherwise refer to them")


def bundle(settings: BundleSettings) -> dict[str, Any]:
    if not settings.base_model and not settings.adapter:
        from kblam_ray.demo.shipped import ADAPTER, BASE_MODEL

        settings = settings.model_copy(update={"base_model": str(BASE_MODEL), "adapter": str(ADAPTER)})
    if not settings.base_model or not settings.adapter:
        missing = "--adapter" if settings.base_model else "--base-model"
        raise InputError(f"{missing} not given", where="command line", help="see `jobs/bundle_model.py --help`")
    if settings.follow and settings.kb_version is not None:
        raise InputError(
            "--follow and --kb-version", where="command line", help="follow the newest version, or name one"
        )
    try:
        from kblam_ray.model import write_bundle
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"bundling needs the package {error.name}", help='pip install "kblam-ray[model]"'
        ) from None
    written = write_bundle(
        settings.output,
        settings.base_model,
        settings.adapter,
        settings.kb,
        settings.kb_version,
        copy_base=settings.copy_base,
        follow=settings.follow,
    )
    assert written.kb is not None
    return {
        "bundle": settings.output,
        "base_model": written.base_model,
        "adapter": written.adapter,
        "kb": written.kb.uri,
        "kb_version": written.kb.version,
    }


if __name__ == "__main__":
    main("bundle_model", BundleSettings, bundle)
