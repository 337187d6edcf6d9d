"""Whether an adapter and an encoder, a table or a memory belong together."""

from __future__ import annotations

from kblam_ray.attention.adapter.config import AdapterConfig
from kblam_ray.encoders.base import EncoderSpec
from kblam_ray.errors import EncoderMismatchError


def require_encoder(config: AdapterConfig, found: EncoderSpec, *, where: str) -> None:
    """Make sure that embeddings of an encoder are those that an adapter reads.

    Args:
        where: what brought the encoder: a table's URI, an argument.

    Raises:
        EncoderMismatchError: they are another encoder's.
    """
    wanted = config.encoder
    # The revision hashes what is inside: one encoder under another name is still that encoder.
    if found.dim == config.dim and (wanted is None or found.revision == wanted.revision):
        return
    named = f"{wanted.name} (revision {wanted.revision})" if wanted else f"one of {config.dim} numbers"
    raise EncoderMismatchError(
        f"the adapter reads encoder {named}, not {found.name} (revision {found.revision}, {found.dim} numbers)",
        where=where,
        help="embed the facts with the adapter's encoder, or choose another adapter",
    )
