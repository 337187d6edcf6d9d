"""A small real knowledge base and the model that ships with the package, for tests of the server."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from kblam_ray import Fact, KnowledgeBase, load_encoder
from kblam_ray.demo.shipped import ADAPTER, BASE_MODEL
from kblam_ray.encoders.base import Encoder
from kblam_ray.model import KnowledgeModel

CAPITALS = {
    "Kenya": "Nairobi",
    "France": "Paris",
    "Peru": "Lima",
    "Japan": "Tokyo",
    "Norway": "Oslo",
    "Ghana": "Accra",
    "Chile": "Santiago",
    "Egypt": "Cairo",
    "Nepal": "Kathmandu",
    "Cuba": "Havana",
    "Iceland": "Reykjavik",
    "Portugal": "Lisbon",
}
CURRENCIES = {"Kenya": "KES", "France": "EUR", "Peru": "PEN", "Japan": "JPY", "Norway": "NOK", "Ghana": "GHS"}

QUESTION = "What is the capital of Kenya?"
ANSWER = "The capital of Kenya is Nairobi."
UNANSWERABLE = "What is the capital of Atlantis?"


def capital_facts() -> list[Fact]:
    """18 facts; one has metadata."""
    capitals = [
        Fact(country, "capital", city, '{"source":"atlas"}' if country == "Kenya" else None)
        for country, city in CAPITALS.items()
    ]
    return capitals + [Fact(country, "currency code", code) for country, code in CURRENCIES.items()]


@lru_cache(maxsize=1)
def minilm() -> Encoder:
    """The encoder of the demo's adapter, loaded once per process (a few seconds)."""
    return load_encoder("all-MiniLM-L6-v2")


def make_kb(folder: Path, name: str = "capitals") -> KnowledgeBase:
    """A table of `capital_facts` at version 0."""
    kb = KnowledgeBase.create(str(folder / name), minilm())
    kb.upsert(capital_facts())
    return kb


@lru_cache(maxsize=1)
def demo_model() -> KnowledgeModel:
    """The shipped base model and adapter with the encoder, loaded once per process."""
    return KnowledgeModel.from_pretrained(BASE_MODEL, ADAPTER, device="cpu", encoder=minilm())
