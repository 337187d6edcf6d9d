"""From an encoder's name to the encoder, or to what identifies it."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from kblam_ray.encoders.base import Encoder, EncoderSpec
from kblam_ray.encoders.remote_models import parse_remote
from kblam_ray.encoders.settings import EncoderSettings
from kblam_ray.errors import EncoderMismatchError, InputError

HASHING = "hashing"


def load_encoder(encoder: str | EncoderSettings, **options: Any) -> Encoder:
    """Load an encoder.

    Args:
        encoder: a name (the table in `kblam_ray.encoders.settings`), or all the settings.
        **options: with a name, the other fields of `EncoderSettings`.

    Raises:
        InputError: an unknown option or a wrong value.
        EncoderNotFoundError: there is no such encoder, or it cannot be had here.
        EncoderMismatchError: its revision is not `expected_revision`.
        EncoderAuthenticationError: a remote encoder without credentials.
        MissingDependencyError: a package that the encoder needs is not installed.
    """
    settings = _settings(encoder, options)
    dim, remote = _hashing_dim(settings.name), parse_remote(settings)
    if dim is not None:
        from kblam_ray.encoders.hashing import HashingEncoder

        loaded: Encoder = HashingEncoder(dim)
    elif remote is not None:
        from kblam_ray.encoders.remote import RemoteEncoder

        loaded = RemoteEncoder(remote, settings)
    else:
        from kblam_ray.encoders.sentence_transformer import load_sentence_transformer

        loaded = load_sentence_transformer(settings)
    _check_revision(loaded.spec, settings)
    return loaded


def encoder_spec(encoder: str | EncoderSettings, **options: Any) -> EncoderSpec:
    """Name, revision and P of an encoder, without loading it where that can be avoided.

    A local model that was never loaded on this machine is loaded once, because its revision is a hash of
    what is inside. Arguments and errors are those of `load_encoder`.
    """
    settings = _settings(encoder, options)
    dim, remote = _hashing_dim(settings.name), parse_remote(settings)
    if dim is not None:
        from kblam_ray.encoders.hashing import hashing_spec

        spec = hashing_spec(dim)
    elif remote is not None:
        spec = remote.spec
    else:
        from kblam_ray.encoders.sentence_transformer import local_spec

        spec = local_spec(settings)
    _check_revision(spec, settings)
    return spec


def _settings(encoder: str | EncoderSettings, options: dict[str, Any]) -> EncoderSettings:
    try:
        if isinstance(encoder, EncoderSettings):
            return EncoderSettings.model_validate({**encoder.model_dump(), **options})
        return EncoderSettings.model_validate({"name": encoder, **options})
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"encoder setting {'.'.join(map(str, first['loc']))}: {first['msg']}",
            where=str(encoder),
            help="the settings are the fields of kblam_ray.encoders.EncoderSettings",
        ) from None


def _hashing_dim(name: str) -> int | None:
    """P of a hashing encoder; None for any other name."""
    kind, _, dim = name.partition(":")
    if kind != HASHING:
        return None
    from kblam_ray.encoders.hashing import DEFAULT_DIM, MAX_DIM

    if name == HASHING:
        return DEFAULT_DIM
    if not (dim.isascii() and dim.isdigit() and 1 <= int(dim) <= MAX_DIM):
        raise InputError("not a dimension", where=name, help=f"write hashing:DIM with DIM from 1 to {MAX_DIM}")
    return int(dim)


def _check_revision(spec: EncoderSpec, settings: EncoderSettings) -> None:
    if settings.expected_revision not in (None, spec.revision):
        raise EncoderMismatchError(
            f"encoder {spec.name} has revision {spec.revision} here, expected is {settings.expected_revision}",
            where=settings.name,
            help="use the copy of the encoder that the table or adapter was made with, or embed the facts anew",
        )
