"""Facts read by a chat model: only what stands in the document is kept, with its position."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kblam_ray.facts.chat import ChatFields, ChatModel
from kblam_ray.facts.extract.findings import Parsed
from kblam_ray.facts.extract.reading_model import chunks, normalized, occurs, read_with_model
from tests.openai_chat_server import Reply, chat_server

TEXT = "Mira  Lake lies in Norway.\nIt is 40 m deep.\n\nThe Tern, a boat of 1234 kg, crosses it."


def answer(*facts: tuple[str, str, str]) -> Reply:
    return Reply(json.dumps({"facts": [dict(zip(("entity", "property", "value"), f, strict=True)) for f in facts]}))


def test_a_fact_is_kept_only_if_its_entity_and_value_stand_in_the_document() -> None:
    reply = answer(
        ("mira lake", "country", "norway"),
        ("Mira Lake", "depth", "40 m"),
        ("Mira Lake", "owner", "the crown"),
        ("Lake Vono", "country", "Norway"),
        ("The Tern", "weight", "123"),
        ("The Tern", "", "1234 kg"),
        ("", "weight", "1234 kg"),
    )
    with chat_server(lambda request: reply) as server:
        model = ChatModel(ChatFields(chat_model="m", chat_url=server.url))
        found, dropped, tokens = read_with_model(Parsed("lake", TEXT), model, 8_000)
    assert [(each.entity, each.property, each.value) for each in found] == [
        ("mira lake", "country", "norway"),
        ("Mira Lake", "depth", "40 m"),
    ]
    assert [TEXT[each.position["offset"] :][: len(each.value)].casefold() for each in found] == ["norway", "40 m"]
    assert dropped == 5
    assert tokens.prompt == 100


def test_the_position_is_that_of_the_value_as_whole_words() -> None:
    text = "Order 1234 of Mira.\n" + "Nothing. " * 30 + "\nMira has 12 boats.\n"
    with chat_server(lambda request: answer(("Mira", "boats", "12"))) as server:
        model = ChatModel(ChatFields(chat_model="m", chat_url=server.url))
        found, _, _ = read_with_model(Parsed("lake", text), model, 200)
    assert {each.position["offset"] for each in found} == {text.index("12 boats")}


def test_each_chunk_is_asked_for_and_positions_name_the_page() -> None:
    def respond(request: dict[str, object]) -> Reply:
        text = request["messages"][1]["content"]  # type: ignore[index]
        return answer(("Mira Lake", "fact", "Norway") if "Norway" in text else ("Mira Lake", "boat", "The Tern"))

    with chat_server(respond) as server:
        model = ChatModel(ChatFields(chat_model="m", chat_url=server.url))
        parsed = Parsed("lake", TEXT, [], [0, TEXT.index("The Tern")])
        found, dropped, _ = read_with_model(parsed, model, 50)
    assert len(server.requests) == 2
    assert dropped == 0
    assert [each.position for each in found] == [
        {"page": 1, "offset": 19},
        {"page": 2, "offset": TEXT.index("The Tern")},
    ]


@pytest.mark.parametrize(
    ("name", "document", "stands"),
    [
        ("12", "weighs 1234 kg", False),
        ("12", "weighs 12 kg", True),
        ("ＡＢＣ", "abc corp", True),
        ("人工智能", "这是人工智能的技术", True),
        ("Karo", "karolina", False),
        ("a  b", "A\nB", True),
        ("-5 °C", "at -5 °C.", True),
        ("", "anything", False),
    ],
)
def test_occurs(name: str, document: str, stands: bool) -> None:
    assert occurs(name, normalized(document)) is stands


@given(st.text(alphabet="ab \n", max_size=400), st.integers(5, 60))
def test_chunks_cover_the_text_in_order(text: str, size: int) -> None:
    rebuilt, last = 0, 0
    for offset, chunk in chunks(text, size):
        assert text[offset : offset + len(chunk)] == chunk
        assert 0 < len(chunk) <= size
        assert not text[last:offset].strip()
        last = offset + len(chunk)
        rebuilt += len(chunk.replace(" ", "").replace("\n", ""))
    assert rebuilt == len(text.replace(" ", "").replace("\n", ""))
