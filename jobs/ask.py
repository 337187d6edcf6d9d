"""Ask a question of a knowledge base, or say how much memory that would take.

    python jobs/ask.py --kb kb/world --question "Who founded Ur?"
    python jobs/ask.py --base-model models/llama --adapter adapters/world --kb kb/world --question "Who founded Ur?"
    python jobs/ask.py --bundle bundles/world --question "Who founded Ur?" --selection similar:100
    python jobs/ask.py --base-model models/llama --adapter adapters/world --kb kb/world --plan

The summary has `text`, `citations` (by falling share of the attention; `fact_id` is a decimal string), `refused` and
`kb_version`. With neither `--base-model` nor `--adapter` the small model and adapter answer that come with the package.
"""

from typing import Any, Literal

from pydantic import Field

from kblam_ray.errors import InputError, MissingDependencyError
from kblam_ray.job import JobConfig, main


class AskSettings(JobConfig):
    """What `jobs/ask.py` takes."""

    question: str | None = Field(None, min_length=1, description="what to ask")
    base_model: str | None = Field(None, description="base model: a folder or a name on the hub; the demo's")
    adapter: str | None = Field(None, description="knowledge adapter: a folder or a name on the hub; the demo's")
    kb: str | None = Field(None, description="the table: a local path or s3://bucket/prefix")
    kb_version: int | None = Field(None, ge=0, description="version of the table: the bundle's, else the newest")
    bundle: str | None = Field(
        None, description="a folder of jobs/bundle_model.py, instead of base model and adapter; it names a table, too"
    )
    grounding: Literal["off", "cite", "verbatim"] = Field(
        "cite", description="off: the answer alone; cite: name the facts used; verbatim: state nothing but their text"
    )
    selection: str = Field("all", description="all facts, or similar:K for those nearest to the question")
    max_citations: int = Field(5, ge=0, description="most facts to name")
    max_new_tokens: int = Field(64, ge=1, description="longest answer, in tokens")
    form: Literal["latent", "materialized", "auto"] = Field("latent", description="how facts are kept in memory")
    device: str | None = Field(None, description="torch device: cuda if there is one, else cpu")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="of the base model: as its configuration states unless given"
    )
    plan: bool = Field(False, description="load nothing and ask nothing: say how many bytes it would take")


def ask(settings: AskSettings) -> dict[str, Any]:
    settings = _with_model(settings)
    _check(settings)
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"answering needs the package {error.name}", help='pip install "kblam-ray[model]"'
        ) from None
    if settings.plan:
        return _planned(settings)
    from kblam_ray import KnowledgeBase
    from kblam_ray.model import KnowledgeModel
    from kblam_ray.model.asking import check_grounding, parse_selection

    check_grounding(settings.grounding)
    parse_selection(settings.selection)
    # Before the base model, which may take minutes to load.
    kb = KnowledgeBase.open(settings.kb, settings.kb_version) if settings.kb else None
    model = KnowledgeModel.from_pretrained(
        settings.bundle or settings.base_model or "",
        settings.adapter,
        device=settings.device,
        dtype=settings.dtype,
    )
    if kb is not None:
        memory = model.load(kb, form=settings.form)
    else:
        memory = model.knowledge(settings.kb_version, settings.form)
    answer = model.ask(
        settings.question or "",
        memory,
        grounding=settings.grounding,
        selection=settings.selection,
        max_citations=settings.max_citations,
        max_new_tokens=settings.max_new_tokens,
    )
    return answer.to_json()


def _planned(settings: AskSettings) -> dict[str, Any]:
    from kblam_ray import KnowledgeBase
    from kblam_ray.attention.adapter.loading import read_adapter
    from kblam_ray.model import Bundle, plan
    from kblam_ray.model.matching import require_encoder

    base_model, adapter, kb, version = settings.base_model, settings.adapter, settings.kb, settings.kb_version
    if settings.bundle:
        bundle = Bundle.read(settings.bundle)
        base_model, adapter = bundle.base_model, bundle.adapter
        if kb is None and bundle.kb is not None:
            kb, version = bundle.kb.uri, bundle.kb.version if version is None else version
    config, tensors, _ = read_adapter(adapter or "")
    num_facts = 0
    if kb:
        table = KnowledgeBase.open(kb, version)
        require_encoder(config, table.encoder, where=table.uri)
        num_facts = table.num_facts
    dtype = next(iter(tensors.values())).dtype
    planned = plan(
        base_model or "",
        None,
        num_facts,
        adapter=config,
        form=settings.form,
        dtype=settings.dtype,
        adapter_dtype=dtype,
    )
    return {"plan": planned.model_dump()}


def _with_model(settings: AskSettings) -> AskSettings:
    """The settings with the demo's base model and adapter where no model is named."""
    if settings.bundle or settings.base_model or settings.adapter:
        return settings
    from kblam_ray.demo.shipped import ADAPTER, BASE_MODEL

    return settings.model_copy(update={"base_model": str(BASE_MODEL), "adapter": str(ADAPTER)})


def _check(settings: AskSettings) -> None:
    parts = {"--base-model": settings.base_model, "--adapter": settings.adapter}
    if settings.bundle and any(parts.values()):
        raise InputError(
            "a bundle and one of its parts",
            where="command line",
            help="give --bundle alone, or --base-model with --adapter",
        )
    missing = [flag for flag, value in parts.items() if not value and not settings.bundle]
    if not settings.bundle and not settings.kb:
        missing.append("--kb")
    if not settings.question and not settings.plan:
        missing.append("--question")
    if missing:
        raise InputError(f"{' and '.join(missing)} not given", where="command line", help="see `jobs/ask.py --help`")


if __name__ == "__main__":
    main("ask", AskSettings, ask)
