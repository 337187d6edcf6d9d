"""Sentence encoders: text to base embedding."""

from kblam_ray.encoders.base import EncodedBatch, Encoder, EncoderSpec
from kblam_ray.encoders.load import encoder_spec, load_encoder
from kblam_ray.encoders.settings import EncoderOptions, EncoderSettings

__all__ = [
    "EncodedBatch",
    "Encoder",
    "EncoderOptions",
    "EncoderSettings",
    "EncoderSpec",
    "encoder_spec",
    "load_encoder",
]
