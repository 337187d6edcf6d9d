"""How soon a file shows in answers: seen by `jobs/refresh_kb.py`, embedded, committed, fetched by every replica.

Two measurements on one directory, watched with the settings that a user gets, and one server. Files of one fact are
added one at a time. Then the facts become those of their next edition, a part at a time, while clients ask about what
changes: an answer names its version and cites its facts, so each citation can be held against the table of that
version. In the end the table must equal the files.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from kblam_ray.errors import InputError, UnavailableError
from kblam_ray.facts.fact import Fact
from kblam_ray.facts.inputs import expand_inputs
from kblam_ray.facts.reading import RejectedRow, read_facts
from kblam_ray.facts.synthetic.generator import BLOCK_FACTS, SyntheticFacts
from kblam_ray.serving.benchmark.clients import Answered, closed_loop, of_sorted, over_http
from kblam_ray.serving.benchmark.load import KB, MANY
from kblam_ray.serving.benchmark.processes import get, refresh_once, running_refresh, running_server
from kblam_ray.serving.benchmark.settings import FollowBenchmark
from kblam_ray.storage import replace_file
from kblam_ray.table.knowledge_base import KnowledgeBase

Contents = Mapping[tuple[str, str], str]
"""Value by entity and property."""

SERVED_S = 120
_POLL_S = 0.01


def benchmark_follow(settings: FollowBenchmark) -> dict[str, Any]:
    """Seconds from a file to the commit and to every replica; what was answered on the way; whether all is exact."""
    editions = [_edition(path) for path in settings.edition]
    with tempfile.TemporaryDirectory() as folder:
        followed = Followed(Path(folder))
        for entity, facts in editions[0].items():
            followed.put(entity, facts)
        flags = ["--kb", followed.kb, "--input", str(followed.inputs), "--vacuum-every-h", "0"]
        refresh_once(*flags)
        with running_server(*_server_flags(settings, followed.kb)) as address:
            followed.address = address
            first, *new = _new_facts(settings.seed, 1 + settings.changes + settings.once)
            with running_refresh(*flags):
                _add(followed, first)  # it runs
                added = [_add(followed, fact) for fact in new[: settings.changes]]
            scheduled = [_add(followed, fact, lambda: refresh_once(*flags)) for fact in new[settings.changes :]]
            found: dict[str, Any] = {
                "facts": sum(map(len, editions[0].values())),
                "replicas": settings.replicas,
                "watched": _told(added),
                "a_refresh_for_each": _told(scheduled),
            }
            with running_refresh(*flags, "--mode", "sync"):
                found["editions"] = [_become(settings, followed, before, after) for before, after in pairwise(editions)]
        # Once more when nobody is left who could change it.
        found["is_exact"] = followed.at(followed.newest()) == followed.wanted
    return found


@dataclass(frozen=True)
class Followup:
    """Seconds from the moment that files stood in the directory."""

    committed_s: float
    served_s: float


@dataclass
class Followed:
    """A directory with a file per entity, the table that follows it, and the server that follows the table.

    Attributes:
        wanted: what the files say.
        served: the version that every replica was last seen to answer from.
    """

    folder: Path
    address: str = ""
    served: int = 0
    wanted: dict[tuple[str, str], str] = field(default_factory=dict)
    _places: dict[str, Path] = field(default_factory=dict)
    _contents: dict[int, Contents] = field(default_factory=dict)

    @property
    def inputs(self) -> Path:
        return self.folder / "in"

    @property
    def kb(self) -> str:
        return str(self.folder / "kb")

    def put(self, entity: str, facts: Iterable[Fact]) -> None:
        """Make the file of an entity say these facts; none: take it away."""
        self.inputs.mkdir(exist_ok=True)
        place = self._places.setdefault(entity, self.inputs / f"{len(self._places):05}.jsonl")
        self.wanted = {name: value for name, value in self.wanted.items() if name[0] != entity}
        rows = [{"entity": fact.entity, "property": fact.property, "value": fact.value} for fact in facts]
        if not rows:
            place.unlink(missing_ok=True)
            return
        self.wanted |= {(row["entity"], row["property"]): row["value"] for row in rows}
        replace_file(str(place), "".join(json.dumps(row) + "\n" for row in rows).encode())

    def at(self, version: int) -> Contents:
        """What a version of the table says."""
        if version not in self._contents:
            facts = KnowledgeBase.open(self.kb, version).snapshot().facts.to_pylist()
            self._contents[version] = {(fact["entity"], fact["property"]): fact["value"] for fact in facts}
            assert len(self._contents[version]) == len(facts), f"version {version} has a fact twice"
        return self._contents[version]

    def newest(self) -> int:
        return KnowledgeBase.open(self.kb).version or 0

    def until_served(self, since_s: float) -> Followup:
        """Wait until every replica answers from a version that says what the files say.

        Raises:
            UnavailableError: that took too long.
        """
        told = None
        while time.time() < since_s + SERVED_S:
            described = get(f"{self.address}/v1/knowledge_bases/{KB}")
            served, version = time.time(), described["version"]
            # Of what is loading or failed on one replica the version is that of the others.
            if described["status"] == "ready" and version is not None and version != told:
                told = self.served = version
                if self.at(version) == self.wanted:
                    committed = (self.folder / "kb" / "_delta_log" / f"{version:020}.json").stat().st_mtime
                    return Followup(committed - since_s, served - since_s)
            time.sleep(_POLL_S)
        raise UnavailableError(
            f"what the files say is not served after {SERVED_S} s", where=f"version {told}", help="see the server's log"
        )


def _edition(path: str) -> dict[str, list[Fact]]:
    """The facts of a file, by entity."""
    found: dict[str, list[Fact]] = {}
    for file in expand_inputs([path]):
        for row in read_facts(file):
            if isinstance(row, RejectedRow):
                raise row.to_error()
            found.setdefault(row.fact.entity, []).append(row.fact)
    if not found:
        raise InputError("no facts", where=path, help="name a file of facts")
    return found


def _server_flags(settings: FollowBenchmark, kb: str) -> list[str]:
    return [
        *("--kb", f"{KB}={kb}", "--model-name", "asked", "--limits-max-queued-requests", str(MANY)),
        *("--replicas-min-replicas", str(settings.replicas), "--replicas-max-replicas", str(settings.replicas)),
        *("--base-model", str(settings.base_model), "--adapter", str(settings.adapter)),
    ]


def _new_facts(seed: int, count: int) -> list[Fact]:
    """Facts of so many entities, one of each."""
    facts = SyntheticFacts(seed)
    return list(islice(({fact.entity: fact for fact in facts.facts(0, BLOCK_FACTS * count)}).values(), count))


def _add(followed: Followed, fact: Fact, take_up: Callable[[], None] = lambda: None) -> Followup:
    since_s = time.time()
    followed.put(fact.entity, [fact])
    take_up()
    return followed.until_served(since_s)


def _become(
    settings: FollowBenchmark, followed: Followed, before: dict[str, list[Fact]], after: dict[str, list[Fact]]
) -> dict[str, Any]:
    """One edition becomes the next, part by part, under questions about what changes."""
    changing = [entity for entity in {**before, **after} if before.get(entity) != after.get(entity)]
    size = max(1, -(-len(changing) // settings.steps))
    parts = [changing[start : start + size] for start in range(0, len(changing), size)]
    first = followed.newest()
    since = followed.at(first)
    said = [fact for entity in changing for fact in [*before.get(entity, []), *after.get(entity, [])]]
    questions = list({f"What is the {fact.property} of {fact.entity}?": None for fact in said})
    over = threading.Event()
    with ThreadPoolExecutor(1) as clients:
        asking = clients.submit(lambda: asyncio.run(_ask(settings, followed, questions, over)))
        try:
            steps = _in_steps(followed, parts, after)
        finally:
            over.set()
    answers = asking.result()
    now = followed.at(followed.newest())
    return {
        "entities_changed": len(changing),
        "facts_added": len(now.keys() - since.keys()),
        "facts_changed": sum(now[name] != since[name] for name in now.keys() & since.keys()),
        "facts_deleted": len(since.keys() - now.keys()),
        "versions": followed.newest() - first,
        "steps": _told(steps),
        **_judged(answers, followed),
    }


def _in_steps(followed: Followed, parts: list[list[str]], after: dict[str, list[Fact]]) -> list[Followup]:
    steps: list[Followup] = []
    for part in parts:
        since_s = time.time()
        for entity in part:
            followed.put(entity, after.get(entity, []))
        steps.append(followed.until_served(since_s))
        print(f"{len(steps)} of {len(parts)} parts: served after {steps[-1].served_s:.2f} s", file=sys.stderr)
    return steps


async def _ask(
    settings: FollowBenchmark, followed: Followed, questions: list[str], over: threading.Event
) -> list[tuple[int, Answered]]:
    """Answers, each with the version that every replica had when it was asked.

    Raises:
        GenerationError: an answer did not come.
    """
    found = []
    async with over_http(followed.address, f"asked:{KB}", settings.grounding, settings.max_tokens, stream=False) as ask:

        async def asked(question: str) -> Answered:
            served = followed.served
            answer = await ask(question)
            found.append((served, answer))
            return answer

        await closed_loop(asked, questions, settings.clients, lambda _: not over.is_set())
    return found


def _judged(answers: list[tuple[int, Answered]], followed: Followed) -> dict[str, Any]:
    """What clients got: whether it was old, and what it cites, held against the version that it names."""
    wrong, num_old = [], 0
    for served, answer in answers:
        assert answer.kb_version is not None, "every answer names its version"
        num_old += answer.kb_version < served
        facts = followed.at(answer.kb_version)
        wrong += [
            f"{answer.question} cites {cited['entity']}, {cited['property']}: {cited['value']} in {answer.kb_version}"
            for cited in answer.citations
            if facts.get((cited["entity"], cited["property"])) != cited["value"]
        ]
    return {
        "answers": len(answers),
        "answers_of_versions": len({answer.kb_version for _, answer in answers}),
        "answers_older_than_served": num_old,
        "refused": sum(answer.refused for _, answer in answers),
        "citations": sum(len(answer.citations) for _, answer in answers),
        "citations_of_other_versions": len(wrong),
        "wrong": wrong[:3],
    }


def _told(followups: list[Followup]) -> dict[str, Any]:
    """Median, 95th percentile and longest, in seconds; of nothing, nothing."""
    if not followups:
        return {"count": 0}
    times = {"file_to_committed_s": [each.committed_s for each in followups]}
    times["committed_to_served_s"] = [each.served_s - each.committed_s for each in followups]
    times["file_to_served_s"] = [each.served_s for each in followups]
    marks = {"median": 0.5, "p95": 0.95, "longest": 1.0}
    told = {name: {mark: round(of_sorted(found, at), 3) for mark, at in marks.items()} for name, found in times.items()}
    return {"count": len(followups), **told}
