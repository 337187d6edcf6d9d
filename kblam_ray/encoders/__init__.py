"""Sentence encoders: text to base embedding."""

from kblam_ray.encoders.base import EncodedBatch, Encoder, EncoderSpec
from kblam_ray.encoders.load import encoder_spec, load_encoder
from kblam_ray.encoders.settings import EncoderSettings

__all__ = ["EncodedBatch", "Encoder", "EncoderSettings", "EncoderSpec", "encoder_spec", "load_encoder"]
