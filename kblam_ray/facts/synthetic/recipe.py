"""Synthetic facts from a chat model, after the KBLaM paper's recipe (arXiv 2410.10450, appendix on the synthetic data).

Thirty types of object crossed with thirty types of idea give 900 themes; for each the model invents named entities and
writes each one's description, objectives and purpose. One request, a few entities of one theme, is one unit of work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from kblam_ray.facts.chat import ChatFields, ChatModel
from kblam_ray.facts.fact import Fact
from kblam_ray.facts.synthetic.draws import Draws, permute
from kblam_ray.facts.units import Outcome, UnitStore

OBJECT_TYPES = (
    "airline", "bakery", "bridge", "city district", "cloud database", "cooking appliance", "cruise ship",
    "dance company", "electric vehicle", "encryption protocol", "festival", "film studio", "garden",
    "hiking trail", "hospital department", "insurance plan", "medical device", "mobile application", "museum",
    "music ensemble", "online course", "power plant", "research laboratory", "restaurant", "satellite", "school",
    "software library", "sports club", "television series", "theatre",
)  # fmt: skip
IDEA_TYPES = (
    "ancient crafts", "animal behaviour", "architecture of the future", "astronomy", "children's imagination",
    "clean energy", "climate adaptation", "cryptography", "deep-sea exploration", "disaster relief",
    "everyday kindness", "fair trade", "folk tales", "forgotten languages", "game theory", "gardening",
    "human memory", "island life", "lost manuscripts", "minimalism", "music and rhythm", "night skies",
    "polar expeditions", "public transport", "river ecology", "robotics", "slow food", "storytelling",
    "traditional medicine", "weather watching",
)  # fmt: skip
NUM_THEMES = len(OBJECT_TYPES) * len(IDEA_TYPES)

PROPERTIES = ("description", "objectives", "purpose")

INSTRUCTIONS = (
    "You invent entities for a synthetic knowledge base. Every name is made up, specific and unlike any real name. "
    "Every text is one plain sentence of at most 25 words about that entity alone, does not repeat its name, and could "
    "not be guessed from the name. Answer with JSON only."
)
REQUEST = (
    "Invent {count} different entities, each of the type '{object}' and inspired by {idea}. Vary the first letters of "
    "the names, for example {first} and {second}. For each give: name; description, what it is; objectives, what it "
    "wants to achieve; purpose, why it exists."
)


class _Entity(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    description: str
    objectives: str
    purpose: str

    @field_validator("*")
    @classmethod
    def _has_words(cls, text: str) -> str:
        # Checked here and not in the schema: strict endpoints refuse schemas with lengths in them.
        if not text.strip():
            raise ValueError("the text is empty")
        return " ".join(text.split())


class Entities(BaseModel):
    """The form of an answer."""

    model_config = ConfigDict(extra="forbid")

    entities: list[_Entity]

    @field_validator("entities")
    @classmethod
    def _not_none(cls, entities: list[_Entity]) -> list[_Entity]:
        if not entities:
            raise ValueError("there is no entity")
        return entities


@dataclass(frozen=True)
class Recipe:
    """Which units there are and how each is asked for; the keys change with everything that changes an answer."""

    chat: ChatFields
    seed: int
    entities_per_request: int

    @cached_property
    def fingerprint(self) -> str:
        asked = (self.chat.chat_model, self.chat.chat_url, self.seed, self.entities_per_request, INSTRUCTIONS, REQUEST)
        return blake2b(repr(asked).encode("utf-8"), digest_size=8).hexdigest()

    def unit(self, number: int) -> dict[str, Any]:
        """Unit `number` of an endless sequence that visits every theme before it visits one again."""
        repeat, place = divmod(number, NUM_THEMES)
        theme = permute(place, NUM_THEMES, self.seed)
        draws = Draws(self.seed, number)
        first, second = draws.sample("ABCDEFGHIJKLMNOPQRSTUVWYZ", 2)
        return {
            "key": f"{self.fingerprint}-{theme:03d}-{repeat:05d}",
            "seed": draws.below(1 << 31),
            "question": REQUEST.format(
                count=self.entities_per_request,
                object=OBJECT_TYPES[theme // len(IDEA_TYPES)],
                idea=IDEA_TYPES[theme % len(IDEA_TYPES)],
                first=first,
                second=second,
            ),
        }

    @cached_property
    def _model(self) -> ChatModel:
        return ChatModel(self.chat)

    def __getstate__(self) -> dict[str, Any]:
        # A client holds sockets: every worker makes its own.
        return {"chat": self.chat, "seed": self.seed, "entities_per_request": self.entities_per_request}

    def __call__(self, unit: dict[str, Any], store: UnitStore) -> Outcome:
        """Ask for one unit and store the answer; safe to repeat."""
        if store.has(unit["key"]):
            return Outcome(unit, unit["key"], reused=True)
        answer = self._model.ask(INSTRUCTIONS, unit["question"], Entities, seed=unit["seed"])
        tokens = answer.tokens
        store.put(
            unit["key"],
            {
                "entities": [entity.model_dump() for entity in answer.value.entities],
                "tokens": {"prompt": tokens.prompt, "completion": tokens.completion, "repeats": tokens.repeats},
            },
        )
        return Outcome(unit, unit["key"])


def facts_of(result: dict[str, Any]) -> Iterator[Fact]:
    """The facts in a stored answer: three for each entity."""
    for entity in result["entities"]:
        for name in PROPERTIES:
            yield Fact(entity["name"], name, entity[name])
