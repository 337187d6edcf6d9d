"""The embedding models behind OpenAI's protocol: their names, dimensions and prices.

The revision of a remote encoder is made of the model's name and dimension: there are no weights to hash, and
the providers promise that a named model does not change. OpenAI and Azure serve the same models, so the same
model is one encoder at both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kblam_ray.encoders.base import EncoderSpec
from kblam_ray.encoders.revision import revision_of
from kblam_ray.encoders.settings import EncoderSettings
from kblam_ray.errors import InputError

Provider = Literal["openai", "azure"]


@dataclass(frozen=True)
class KnownModel:
    """A model of OpenAI's: P, list price, and whether the server can shorten its embeddings."""

    dim: int
    usd_per_million_tokens: float
    shortens: bool


PRICES_AS_OF = "2026-05"
"""Month of the list prices below, in US dollars without volume or batch discounts; Azure's are the same."""

KNOWN_MODELS = {
    "text-embedding-3-small": KnownModel(1536, 0.02, shortens=True),
    "text-embedding-3-large": KnownModel(3072, 0.13, shortens=True),
    "text-embedding-ada-002": KnownModel(1536, 0.10, shortens=False),
}


@dataclass(frozen=True)
class RemoteModel:
    """A model at a provider: `deployment` is what the provider calls it, `model` what it is."""

    provider: Provider
    deployment: str
    model: str
    dim: int
    sent_dimensions: int | None
    usd_per_million_tokens: float | None

    @property
    def spec(self) -> EncoderSpec:
        known = KNOWN_MODELS.get(self.model)
        name = f"{self.provider}:{self.deployment}"
        name += f"={self.model}" if self.model != self.deployment else ""
        name += f"@{self.dim}" if known is None or known.dim != self.dim else ""
        return EncoderSpec(name=name, revision=revision_of("remote", self.model, str(self.dim)), dim=self.dim)


def parse_remote(settings: EncoderSettings) -> RemoteModel | None:
    """The remote model that the settings name; None where the name is of another kind.

    Raises:
        InputError: the dimension is missing, not a number, or not one that the model has.
    """
    bare, _, dim_text = settings.name.partition("@")
    if bare in KNOWN_MODELS:
        provider, rest = "openai", bare
    else:
        provider, colon, rest = bare.partition(":")
        if not colon or provider not in ("openai", "azure"):
            return None
    deployment, _, model = rest.partition("=")
    if not deployment:
        raise InputError(
            "a remote encoder without a model", where=settings.name, help="write openai:MODEL or azure:DEPLOYMENT"
        )
    model = model or deployment
    known = KNOWN_MODELS.get(model)
    if dim_text and not (dim_text.isascii() and dim_text.isdigit() and int(dim_text) > 0):
        raise InputError("not a dimension", where=settings.name, help="write a number after the @")
    if known is None and not dim_text:
        raise InputError(
            f"the dimension of the model {model} is not known",
            where=settings.name,
            help=f"write its dimension, {settings.name}@DIM, or choose from {', '.join(KNOWN_MODELS)}"
            + ("; for a deployment with a name of its own write azure:DEPLOYMENT=MODEL" if provider == "azure" else ""),
        )
    dim = int(dim_text) if dim_text else known.dim if known else 0
    sent = None
    if known is not None and dim != known.dim:
        if not known.shortens or dim > known.dim:
            raise InputError(
                f"{model} has no embeddings of {dim} numbers",
                where=settings.name,
                help=f"take at most {known.dim}" if known.shortens else f"its only dimension is {known.dim}",
            )
        sent = dim
    price = settings.usd_per_million_tokens
    if price is None and known is not None:
        price = known.usd_per_million_tokens
    return RemoteModel("azure" if provider == "azure" else "openai", deployment, model, dim, sent, price)
