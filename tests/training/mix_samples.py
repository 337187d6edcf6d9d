"""Embedded synthetic facts, and makers of training examples over them, for small tokenizers made without a network."""

from __future__ import annotations

import functools

from model_samples import llama_tokenizer

from kblam_ray.encoders.hashing import HashingEncoder
from kblam_ray.facts.fact import Fact
from kblam_ray.facts.synthetic import SyntheticFacts
from kblam_ray.model.chat import ChatTemplate
from kblam_ray.table.embedded import EmbeddedFacts
from kblam_ray.training.mix import MixSettings
from kblam_ray.training.mix.examples import ExampleMaker

ENCODER = HashingEncoder(64)


@functools.cache
def synthetic(num_facts: int = 400, seed: int = 1) -> EmbeddedFacts:
    return EmbeddedFacts.embed(list(SyntheticFacts(seed).facts(0, num_facts)), ENCODER)


def embedded(*facts: tuple[str, str, str]) -> EmbeddedFacts:
    return EmbeddedFacts.embed([Fact(*texts) for texts in facts], ENCODER)


def make(facts: EmbeddedFacts | None = None, *, tokenizer=None, texts=(), **settings) -> ExampleMaker:
    chosen = {"batch_size": 16, "kb_size": (20, 40), "max_tokens": 600, **settings}
    chat = ChatTemplate(tokenizer or llama_tokenizer())
    return ExampleMaker(facts or synthetic(), chat, MixSettings(**chosen), texts=texts)


def of_kind(maker: ExampleMaker, kind: str, count: int, *, limit: int = 4_000):
    """The first examples of a kind."""
    found = []
    for number in range(limit):
        step, place = divmod(number, maker.settings.batch_size)
        if maker._step(step).kinds[place] == kind:
            found.append(maker.example(number))
            if len(found) == count:
                return found
    raise AssertionError(f"no {count} examples of the kind {kind}")
