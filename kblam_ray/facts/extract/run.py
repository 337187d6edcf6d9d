"""From documents to one file of facts: a unit of work per document, kept by its content, then merged in order."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, Literal

from pydantic import Field

from kblam_ray.errors import ChatAnswerError, DocumentError, InputError, KblamError
from kblam_ray.facts.chat import ChatFields, ChatModel, Tokens
from kblam_ray.facts.extract.documents import find_documents, parser_of, read_bytes
from kblam_ray.facts.extract.reading_model import INSTRUCTIONS, read_with_model
from kblam_ray.facts.fact import Fact, fact_id
from kblam_ray.facts.output import FactsOutput
from kblam_ray.facts.reading import RejectedRow
from kblam_ray.facts.rows import NotAFactError, canonical_metadata, validate_fact
from kblam_ray.facts.units import Outcome, UnitStore, run_units
from kblam_ray.facts.writing import write_rejected
from kblam_ray.ray_session import start_ray

RULES_VERSION = 2
"""Raised when the rules find something else in the same document, so that kept results are not used again."""


class ExtractSettings(ChatFields):
    """What `jobs/extract_kb.py` takes."""

    input: list[str] = Field(min_length=1, description="documents: a file, directory, glob or s3:// prefix")
    output: str = Field(description="a .jsonl, .parquet, .csv or .json file, or a directory for Parquet parts")
    method: Literal["rules", "llm"] | None = Field(
        None, description="rules read `key: value` lines, tables and front matter; llm asks the chat model "
        "(default: llm if --chat-model is given, else rules)"
    )  # fmt: skip
    chunk_chars: int = Field(8_000, ge=200, description="llm: characters of a document sent at a time")
    on_error: Literal["fail", "skip"] = Field("fail", description="what a document does that cannot be read")
    num_workers: int | None = Field(None, ge=1, description="most workers at a time (default: one per CPU)")
    work_dir: str | None = Field(
        None,
        description="where each document's facts are kept for the next run (default: a hidden folder beside output)",
    )


@dataclass(frozen=True)
class Extraction:
    """What a worker does with one document. The key changes with its bytes, its place and all settings that matter."""

    method: Literal["rules", "llm"]
    chat: ChatFields
    chunk_chars: int

    @cached_property
    def _fingerprint(self) -> bytes:
        asked: tuple[Any, ...] = (RULES_VERSION,)
        if self.method == "llm":
            asked += (self.chat.chat_model, self.chat.chat_url, self.chunk_chars, INSTRUCTIONS)
        return repr(asked).encode("utf-8")

    @cached_property
    def _model(self) -> ChatModel:
        return ChatModel(self.chat)

    def __getstate__(self) -> dict[str, Any]:
        # A client holds sockets: every worker makes its own.
        return {"method": self.method, "chat": self.chat, "chunk_chars": self.chunk_chars}

    def __call__(self, unit: dict[str, Any], store: UnitStore) -> Outcome:
        """Read one document and store what it yields; safe to repeat.

        Raises:
            DocumentError, ChatError, StorageError, MissingDependencyError, InputError: nothing was stored.
        """
        uri = unit["uri"]
        data = read_bytes(uri)
        digest = blake2b(digest_size=16)
        for part in (uri.encode("utf-8"), self._fingerprint, data):
            digest.update(len(part).to_bytes(8, "little") + part)
        key = digest.hexdigest()
        if store.has(key):
            return Outcome(unit, key, reused=True)
        parsed = parser_of(uri)(data, uri)
        if not parsed.text.strip():
            raise DocumentError("an empty document", where=uri, help="remove it from the input, or `--on-error skip`")
        found, dropped, tokens = parsed.findings, 0, Tokens()
        if self.method == "llm":
            found, dropped, tokens = read_with_model(parsed, self._model, self.chunk_chars)
        facts = []
        for finding in found:
            metadata = canonical_metadata({"source": uri, "position": finding.position, "method": self.method})
            try:
                fact = validate_fact(Fact(finding.entity, finding.property, finding.value, metadata))
            except NotAFactError:
                dropped += 1
            else:
                facts.append([fact.entity, fact.property, fact.value, fact.metadata])
        result = {"facts": facts, "dropped": dropped, "prompt": tokens.prompt, "completion": tokens.completion}
        store.put(key, result)
        return Outcome(unit, key)


def extract(settings: ExtractSettings) -> dict[str, Any]:
    """Write the facts of all documents; returns the job's summary.

    Raises:
        InputError: nothing to read, a bad document (`on_error="fail"`), no fact in any document.
        ChatError, StorageError: the machinery failed; finished documents are kept for the next run.
    """
    output = FactsOutput(settings.output)
    method = settings.method or ("llm" if settings.chat_model else "rules")
    chat = ChatFields(**{name: getattr(settings, name) for name in ChatFields.model_fields})
    if method == "llm":
        ChatModel(chat)
    documents, passed_over = find_documents(settings.input)
    store = UnitStore(settings.work_dir or output.work_uri)
    start_ray()
    outcomes = run_units(
        [{"number": number, "uri": uri} for number, uri in enumerate(documents)],
        Extraction(method, chat, settings.chunk_chars),
        store,
        what="documents",
        num_threads=settings.chat_concurrency if method == "llm" else 1,
        num_workers=settings.num_workers,
    )
    keys: dict[int, str] = {}
    failures: dict[int, KblamError] = {}
    reused = 0
    for outcome in outcomes:
        number = outcome.unit["number"]
        if outcome.key is not None:
            keys[number], reused = outcome.key, reused + outcome.reused
        elif isinstance(outcome.error, (DocumentError, ChatAnswerError)):
            failures[number] = outcome.error
        elif outcome.error is not None:
            raise outcome.error
    rejected_path = _report(failures, documents, output, settings.on_error)
    merge = _Merge(store, [keys[number] for number in sorted(keys)])
    facts = iter(merge.facts())
    first = next(facts, None)
    if first is None:
        raise InputError(
            f"no fact found in {len(documents)} documents",
            where=", ".join(settings.input),
            help="write `key: value` lines or tables, or read prose with --method llm and --chat-model",
        )
    num_facts = output.write(_chain(first, facts))
    if merge.conflicts:
        print(
            f"{merge.conflicts} properties have more than one value, for example {merge.example}: "
            "all are kept in the order found; embed_kb keeps the last, or all with --identity entity,property,value",
            file=sys.stderr,
        )
    return {
        "method": method,
        "output": output.uri,
        "documents": len(documents),
        "documents_reused": reused,
        "documents_failed": len(failures),
        "files_passed_over": passed_over,
        "rejected_path": rejected_path,
        "num_facts": num_facts,
        "num_entities": len(merge.entities),
        "num_properties": len(merge.properties),
        "duplicates": merge.duplicates,
        "conflicts": merge.conflicts,
        "dropped": merge.dropped,
        "tokens": merge.tokens,
        "work_dir": store.uri,
    }


def _chain(first: Fact, rest: Iterator[Fact]) -> Iterator[Fact]:
    yield first
    yield from rest


def _report(
    failures: dict[int, KblamError], documents: Sequence[str], output: FactsOutput, on_error: str
) -> str | None:
    """Fail at the first document that could not be read, or list all such documents beside the output."""
    if not failures:
        return None
    first = failures[min(failures)]
    if on_error == "fail":
        if len(failures) > 1:
            print(f"{len(failures)} documents could not be read", file=sys.stderr)
        raise first
    folder, _, name = output.uri.rpartition("/")
    path = f"{folder}/_{name}.rejected.jsonl"  # a name that readers of a folder of facts pass over
    write_rejected(
        (RejectedRow(documents[n], 1, failures[n].what, failures[n].where or "", fatal=True) for n in sorted(failures)),
        path,
    )
    print(f"{len(failures)} documents could not be read, for example: {first}. All: {path}", file=sys.stderr)
    return path


class _Merge:
    """The stored facts of many documents, each once, and what was noticed; holds ids, not texts."""

    def __init__(self, store: UnitStore, keys: Sequence[str]) -> None:
        self._store = store
        self._keys = keys
        self.duplicates = self.conflicts = self.dropped = self.tokens = 0
        self.example = ""
        self.entities: set[bytes] = set()
        self.properties: set[str] = set()

    def facts(self) -> Iterator[Fact]:
        seen: set[int] = set()
        pairs: dict[int, bool] = {}
        for key in self._keys:
            result = self._store.get(key)
            self.dropped += result["dropped"]
            self.tokens += result["prompt"] + result["completion"]
            for texts in result["facts"]:
                fact = Fact(*texts)
                triple, pair = fact_id(fact, "entity,property,value"), fact_id(fact)
                if triple in seen:
                    self.duplicates += 1
                    continue
                seen.add(triple)
                if pairs.get(pair) is False:
                    pairs[pair] = True
                    self.conflicts += 1
                    self.example = self.example or json.dumps([fact.entity, fact.property], ensure_ascii=False)
                pairs.setdefault(pair, False)
                self.entities.add(blake2b(fact.entity.encode("utf-8"), digest_size=8).digest())
                self.properties.add(fact.property)
                yield fact
