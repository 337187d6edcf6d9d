"""extract_kb end to end on Ray: documents in, facts out, resumed by content, through the readers that embed_kb uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kblam_ray.errors import ChatAnswerError, ChatAuthenticationError, DocumentError, InputError
from kblam_ray.facts import Fact, expand_inputs, read_facts
from kblam_ray.facts.extract.run import ExtractSettings, extract
from kblam_ray.facts.reading import FactRow
from tests.openai_chat_server import Reply, chat_server

pytestmark = pytest.mark.usefixtures("ray_session")


def run(folder: Path, **settings: Any) -> dict[str, Any]:
    settings.setdefault("output", str(folder.parent / "facts.jsonl"))
    return extract(ExtractSettings(input=[str(folder)], **settings))


def read(uri: str) -> list[Fact]:
    rows = [row for file in expand_inputs([uri]) for row in read_facts(file)]
    assert all(isinstance(row, FactRow) for row in rows), rows
    return [row.fact for row in rows if isinstance(row, FactRow)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a_pump.txt").write_text("Weight: 30 kg\nColour: red\nColour: red\n")
    (folder / "b.md").write_text("# a pump\n\nColour: blue\n\n| City | Country |\n|--|--|\n| Lyon | France |\n")
    return folder


def test_documents_become_facts_with_their_source_and_position(folder: Path) -> None:
    summary = run(folder)
    facts = read(summary["output"])
    assert [(fact.entity, fact.property, fact.value) for fact in facts] == [
        ("a pump", "Weight", "30 kg"),
        ("a pump", "Colour", "red"),
        ("a pump", "Colour", "blue"),
        ("Lyon", "Country", "France"),
    ]
    assert json.loads(facts[0].metadata or "") == {
        "source": str(folder / "a_pump.txt"),
        "position": {"line": 1},
        "method": "rules",
    }
    counts = {name: summary[name] for name in ("num_facts", "num_entities", "duplicates", "conflicts", "documents")}
    assert counts == {"num_facts": 4, "num_entities": 2, "duplicates": 1, "conflicts": 1, "documents": 2}


def test_a_rerun_reads_only_what_changed(folder: Path) -> None:
    first = run(folder, output=str(folder.parent / "parts"))
    (folder / "b.md").write_text("# a pump\n\nColour: green\n")
    second = run(folder, output=str(folder.parent / "parts"))
    assert (first["documents_reused"], second["documents_reused"]) == (0, 1)
    assert [fact.value for fact in read(second["output"])] == ["30 kg", "red", "green"]
    (folder / "b.md").unlink()
    third = run(folder, output=str(folder.parent / "parts"))
    assert (third["documents_reused"], third["num_facts"]) == (1, 2)


def test_a_document_that_cannot_be_read_fails_the_job_or_is_listed(folder: Path) -> None:
    (folder / "c.txt").write_bytes(b"a: \xff")
    (folder / "d.txt").write_text("")
    with pytest.raises(DocumentError, match=r"not UTF-8.*c\.txt: line 1"):
        run(folder)
    assert not (folder.parent / "facts.jsonl").exists()
    summary = run(folder, on_error="skip")
    assert (summary["documents_failed"], summary["documents_reused"], summary["num_facts"]) == (2, 2, 4)
    listed = [json.loads(line) for line in Path(summary["rejected_path"]).read_text().splitlines()]
    assert [Path(row["file"]).name for row in listed] == ["c.txt", "d.txt"]


def test_documents_without_a_fact_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("Nothing to see here.")
    with pytest.raises(InputError, match="no fact found in 1 documents"):
        run(tmp_path / "docs")


def test_a_chat_model_reads_each_document_once(folder: Path) -> None:
    def respond(request: dict[str, Any]) -> Reply:
        known = "30 kg" in request["messages"][1]["content"]
        fact = {"entity": "Lyon", "property": "country", "value": "France"}
        weight = {"entity": "Colour", "property": "weight of it", "value": "30 kg"}
        return Reply(json.dumps({"facts": [weight if known else fact, fact | {"entity": "Nantes"}]}))

    with chat_server(respond) as server:
        settings = {"chat_model": "m", "chat_url": server.url}
        first = run(folder, **settings)
        second = run(folder, **settings)
    assert len(server.requests) == 2
    assert (first["method"], first["num_facts"], first["dropped"], first["tokens"]) == ("llm", 2, 2, 240)
    assert (second["documents_reused"], second["num_facts"], second["dropped"]) == (2, 2, 2)
    offset = (folder / "b.md").read_text().index("France")
    assert read(second["output"])[1].metadata == json.dumps(
        {"method": "llm", "position": {"offset": offset}, "source": str(folder / "b.md")}, separators=(",", ":")
    )


def test_what_a_chat_model_cannot_do_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def respond(request: dict[str, Any]) -> Reply:
        if "30 kg" in request["messages"][1]["content"]:
            return Reply("no JSON")
        return Reply(json.dumps({"facts": [{"entity": "Lyon", "property": "country", "value": "France"}]}))

    with chat_server(respond) as server:
        settings = {"chat_model": "m", "chat_url": server.url}
        with pytest.raises(ChatAnswerError, match="in 3 attempts"):
            run(folder, **settings)
        summary = run(folder, on_error="skip", **settings)
    assert (summary["documents_failed"], summary["documents_reused"], summary["num_facts"]) == (1, 1, 1)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ChatAuthenticationError, match="OPENAI_API_KEY"):
        run(folder, chat_model="m")


def test_documents_and_facts_on_an_object_store(folder: Path, s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray's workers were started before the endpoint was known: the units are done in this process.
    from kblam_ray.facts.extract.run import Extraction
    from kblam_ray.facts.units import UnitStore
    from kblam_ray.storage import filesystem

    store, path = filesystem(f"{s3_uri}/docs/pump.txt")
    with store.open_output_stream(path) as stream:
        stream.write(b"Weight: 30 kg\n")
    units = UnitStore(f"{s3_uri}/.facts.units")
    from kblam_ray.facts.chat import ChatFields

    work = Extraction("rules", ChatFields(), 8_000)
    first = work({"uri": f"{s3_uri}/docs/pump.txt"}, units)
    second = work({"uri": f"{s3_uri}/docs/pump.txt"}, units)
    assert first.key == second.key
    assert (first.reused, second.reused) == (False, True)
    assert units.keys() == {first.key}
    assert units.get(first.key or "")["facts"][0][:3] == ["pump", "Weight", "30 kg"]
