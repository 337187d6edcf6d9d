"""The hashing encoder: deterministic, lexical, in every script."""

from __future__ import annotations

import numpy as np
import pytest

from kblam_ray.encoders import encoder_spec, load_encoder
from kblam_ray.errors import EncoderMismatchError, InputError

TEXTS = [
    "the capital of France",
    "the capital of Frances",
    "the currency of Japan",
    "法国的首都",
    "法国首都",
    "日本の通貨",
    "☃",
]


def test_vectors_are_frozen() -> None:
    """A table made by an earlier release must still match: these numbers may change only with the revision."""
    encoder = load_encoder("hashing:8")
    assert encoder.spec.revision == "8528070c1f4b968f0e3f32af325529ac"
    frozen = np.array([-5, -5, -3, -4, 4, 0, 3, -4]) / np.sqrt(116)
    np.testing.assert_allclose(encoder.encode(["the capital of France"])[0], frozen, atol=1e-6)


def test_vectors_are_of_length_one_and_independent_of_the_batch() -> None:
    encoder = load_encoder("hashing")
    vectors = encoder.encode(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), encoder.spec.dim) == (7, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(load_encoder("hashing").encode(TEXTS[::-1] * 400)[: len(TEXTS)], vectors[::-1])


def test_likeness_is_lexical_in_each_script() -> None:
    similarity = load_encoder("hashing:4096").encode(TEXTS) @ load_encoder("hashing:4096").encode(TEXTS).T
    assert similarity[0, 1] > 0.8 > similarity[0, 2] > similarity[0, 5]
    assert similarity[3, 4] > 0.2 > similarity[3, 5]


def test_case_counts_and_canonical_spellings_do_not() -> None:
    vectors = load_encoder("hashing").encode(["us", "US", "caf\u00e9", "cafe\u0301"])
    assert vectors[0] @ vectors[1] < 0.9
    np.testing.assert_array_equal(vectors[2], vectors[3])


def test_nothing_to_hash() -> None:
    encoder = load_encoder("hashing")
    assert not encoder.encode([""]).any()
    assert encoder.encode([]).shape == (0, 384)


def test_the_dimension_is_part_of_name_and_revision() -> None:
    assert encoder_spec("hashing") == encoder_spec("hashing:384") == load_encoder("hashing:384").spec
    assert encoder_spec("hashing:100").revision != encoder_spec("hashing").revision
    assert encoder_spec("hashing:100").name == "hashing:100"


@pytest.mark.parametrize("name", ["hashing:0", "hashing:x", "hashing:", "hashing:99999999", "hashing:-3"])
def test_wrong_dimensions(name: str) -> None:
    with pytest.raises(InputError, match="hashing:DIM"):
        load_encoder(name)


def test_an_expected_revision_is_checked() -> None:
    load_encoder("hashing", expected_revision=encoder_spec("hashing").revision)
    with pytest.raises(EncoderMismatchError, match="hashing has revision"):
        load_encoder("hashing", expected_revision="0" * 32)
    with pytest.raises(EncoderMismatchError):
        encoder_spec("hashing", expected_revision="0" * 32)


@pytest.mark.parametrize("options", [{"nonsense": 1}, {"concurrency": 0}, {"backend": "tpu"}])
def test_unknown_and_wrong_settings(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        load_encoder("hashing", **options)
