"""The ledger: a fold of the log, exact whatever refreshes cross, proved on a model of table, files and refreshes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from kblam_ray.table.refresh.ledger import GONE, METADATA_KEY, NO_TABLE, WRITE_PREFIX, Ledger, Taken, Verdict


def said(base: int, files: dict[str, str], **others) -> dict:
    return Taken(NO_TABLE, base, files, **others).metadata()


def folded(*infos: dict) -> Ledger:
    ledger = Ledger()
    for version, info in enumerate(infos):
        ledger.fold(version, info)
    return ledger


def test_a_file_is_done_in_the_state_in_which_it_was_taken_up_and_in_no_other():
    ledger = folded(said(NO_TABLE, {"a": "1"}))
    assert ledger.verdict("a", "1") is Verdict.DONE
    assert ledger.verdict("a", "2") is Verdict.CHANGED
    assert ledger.verdict("b", "1") is Verdict.CHANGED
    assert ledger.verdict("b", GONE) is Verdict.DONE


def test_commits_of_others_are_passed_over():
    ledger = folded(said(NO_TABLE, {"a": "1"}), {"operation": "WRITE"}, {METADATA_KEY: "nonsense"}, {METADATA_KEY: {}})
    assert ledger.version == 3
    assert ledger.verdict("a", "1") is Verdict.DONE


def test_an_old_content_that_lands_late_is_noticed():
    ledger = folded(said(NO_TABLE, {"a": "0"}), said(0, {"a": "2"}), said(0, {"a": "1"}))
    assert ledger.verdict("a", "2") is Verdict.DISPUTED
    ledger.fold(3, said(2, {"a": "2"}))
    assert ledger.verdict("a", "2") is Verdict.DONE


def test_a_content_that_comes_back_is_a_change():
    ledger = folded(said(NO_TABLE, {"a": "1"}), said(0, {"a": "2"}))
    assert ledger.verdict("a", "1") is Verdict.CHANGED


def test_refreshes_of_different_files_that_cross_are_both_looked_at_again():
    ledger = folded(said(NO_TABLE, {"c": "1"}), said(0, {"a": "1"}, updated_at=20), said(0, {"b": "1"}, updated_at=10))
    assert [ledger.verdict(uri, "1") for uri in "abc"] == [Verdict.DISPUTED, Verdict.DISPUTED, Verdict.DONE]
    assert ledger.stamps("b") == {10, 20}
    ledger.observe({"a": "1", "b": "1"}, 2)
    assert [ledger.verdict(uri, "1") for uri in "ab"] == [Verdict.DONE, Verdict.DONE]


def test_two_that_make_the_table_at_once_cross():
    ledger = folded(said(NO_TABLE, {"a": "1"}), said(NO_TABLE, {"b": "1"}))
    assert ledger.verdict("a", "1") is ledger.verdict("b", "1") is Verdict.DISPUTED


def test_a_complete_commit_says_which_files_are_gone():
    ledger = folded(said(NO_TABLE, {"a": "1", "b": "1"}, complete=True), said(0, {"b": "1"}, complete=True))
    assert ledger.verdict("a", GONE) is Verdict.DONE
    assert ledger.verdict("a", "1") is Verdict.CHANGED
    assert ledger.is_complete()
    ledger.fold(2, said(1, {"c": "1"}))
    assert not ledger.is_complete()


TAGS = st.sampled_from(["1", "2", "3"])
FILES = st.dictionaries(st.sampled_from(["a", "b", "ü c"]), TAGS, max_size=3)


@st.composite
def logs(draw: st.DrawFn) -> list[dict]:
    infos: list[dict] = []
    for version in range(draw(st.integers(1, 8))):
        if draw(st.booleans()) or not version:
            base = draw(st.integers(NO_TABLE, version - 1))
            infos.append(
                said(base, draw(FILES), updated_at=draw(st.integers(0, 50)), complete=draw(st.integers(0, 4)) == 0)
            )
        else:
            infos.append({"operation": "WRITE"})
    return infos


@given(infos=logs(), data=st.data())
def test_any_copy_of_the_ledger_leads_to_the_same(infos: list[dict], data: st.DataObject):
    whole = folded(*infos)
    copied = folded(*infos[: data.draw(st.integers(0, len(infos)))])
    copied = Ledger.from_json(json.loads(json.dumps(copied.to_json())))
    for version in range(copied.version + 1, len(infos)):
        copied.fold(version, infos[version])
    assert copied == whole


@dataclass
class Table:
    """Rows of every commit; the live row of a fact is the one with the largest stamp, as in a real table."""

    commits: list[tuple[dict[str, str], int, str, dict]] = field(default_factory=list)

    def live(self, version: int) -> dict[str, tuple[int, str, str]]:
        found: dict[str, tuple[int, str, str]] = {}
        for rows, stamp, write_id, _ in self.commits[: version + 1]:
            for fact, value in rows.items():
                found[fact] = max(found.get(fact, (0, "", "")), (stamp, write_id, value))
        return found

    def newest(self, version: int) -> int:
        return max([0, *(stamp for _, stamp, _, _ in self.commits[: version + 1])])


@dataclass
class Worker:
    """A refresh that can be held up between any two of its steps: list and read, plan, commit."""

    table: Table
    skew: int
    ledger: Ledger = field(default_factory=Ledger)
    unsaid: dict[str, tuple[str, int]] = field(default_factory=dict)
    read: dict[str, tuple[int, str, dict[str, str]]] | None = None
    planned: tuple[dict[str, str], int, dict] | None = None

    def look(self) -> int:
        for version in range(self.ledger.version + 1, len(self.table.commits)):
            self.ledger.fold(version, self.table.commits[version][3])
        return self.ledger.version

    def step(self, files: dict, now: int) -> bool:
        """Do the next step; false if there was nothing to do."""
        if self.planned is not None:
            rows, stamp, info = self.planned
            self.table.commits.append((rows, stamp, f"{WRITE_PREFIX}{len(self.table.commits)}", info))
            self.planned = None
        elif self.read is not None:
            self._plan(files, now)
        else:
            self.look()
            self.read = {uri: file for uri, file in files.items() if self._is_open(uri, file[1])} or None
            return self.read is not None
        return True

    def _is_open(self, uri: str, tag: str) -> bool:
        return self.ledger.verdict(uri, tag) is not Verdict.DONE

    def _plan(self, files: dict, now: int) -> None:
        assert self.read is not None
        base = self.look()
        # What was read is still what the file says, now that this version has been seen.
        self.read = {uri: file for uri, file in self.read.items() if files[uri] == file}
        disputed = {uri for uri, file in files.items() if self.ledger.verdict(uri, file[1]) is Verdict.DISPUTED}
        if disputed - set(self.read):
            self.read = None
            return
        live = self.table.live(base)
        left = {uri: file for uri, file in self.read.items() if self._is_open(uri, file[1])}
        wanted = {}
        for uri, (_, tag, facts) in sorted(left.items(), key=lambda item: item[1][0]):
            is_disputed = self.ledger.verdict(uri, tag) is Verdict.DISPUTED
            for fact, value in facts.items():
                wanted[fact] = value, self.ledger.stamps(uri) if is_disputed else None
        rows = {}
        for fact, (value, stamps) in wanted.items():
            stamp, write_id, there = live.get(fact, (0, "", ""))
            may = stamps is None or fact not in live or (write_id.startswith(WRITE_PREFIX) and stamp in stamps)
            if there != value and may:
                rows[fact] = value
        tags = {uri: tag for uri, (_, tag, _) in left.items()}
        self.read = None
        if not rows:
            self.ledger.observe(tags, base)
            self.unsaid.update((uri, (tag, base)) for uri, tag in tags.items())
            return
        stamp = max(now + self.skew, self.table.newest(base) + 1)
        self.planned = rows, stamp, said(base, tags, updated_at=stamp, looked=self.unsaid)
        self.unsaid = {}


FACTS_OF_FILE = {"f": ["x", "y"], "g": ["x", "z"], "h": ["y", "z", "x"]}

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.sampled_from(sorted(FACTS_OF_FILE))),
        st.tuples(st.just("step"), st.integers(0, 2)),
        st.tuples(st.just("step"), st.integers(0, 2)),
    ),
    min_size=5,
    max_size=60,
)


@settings(max_examples=250)
@given(
    actions=ACTIONS, skews=st.tuples(*[st.integers(0, 40)] * 3), forgets=st.booleans(), tag=st.sampled_from(["", "s@"])
)
def test_whatever_crosses_the_table_ends_as_the_files_say(actions: list, skews: tuple, forgets: bool, tag: str):
    """Also where nothing but the moment tells one content of a file from another."""
    table, files = Table(), {}
    workers = [Worker(table, skew) for skew in skews]
    for now, (what, which) in enumerate(actions, start=1):
        if what == "write":
            facts = {fact: f"{which}{now}{fact}" for fact in FACTS_OF_FILE[which]}
            files[which] = (now, f"{tag}{now}", facts)
        else:
            workers[which].step(files, now)
    now = len(actions)
    if forgets:  # two die, and are started again by what the log says
        workers[1:] = [Worker(table, worker.skew) for worker in workers[1:]]
    quiet = 0
    while quiet < 2 * len(workers):
        now += 1
        assert now < len(actions) + 200, "the refreshes never come to rest"
        has_worked = workers[now % len(workers)].step(files, now)
        quiet = 0 if has_worked else quiet + 1
    expected = {}
    for _, _, facts in sorted(files.values(), key=lambda file: file[0]):
        expected.update(facts)
    assert {fact: value for fact, (_, _, value) in table.live(len(table.commits)).items()} == expected


@settings(max_examples=100)
@given(actions=ACTIONS, skews=st.tuples(*[st.integers(0, 40)] * 3))
def test_what_others_wrote_when_all_was_taken_up_stays(actions: list, skews: tuple):
    table, files = Table(), {}
    workers = [Worker(table, skew) for skew in skews]
    for now, (what, which) in enumerate(actions, start=1):
        if what == "write":
            files[which] = (now, f"{now}", {fact: f"{which}{now}{fact}" for fact in FACTS_OF_FILE[which]})
        else:
            workers[which].step(files, now)
    now = len(actions)
    for worker in workers:  # what is planned is committed, what is in dispute is not settled yet
        if worker.planned:
            worker.step(files, now)
    stamp = table.newest(len(table.commits)) + 1
    table.commits.append(({"x": "by hand"}, stamp, "w", {}))
    seen = dict(files)
    for worker in workers:
        known = worker.look()
        # Files that no refresh has taken up in their present state are news, and news win.
        open_files = {uri for uri in seen if worker.ledger.verdict(uri, seen[uri][1]) is Verdict.CHANGED}
        assert known == len(table.commits) - 1
    if open_files:
        return
    for now in range(len(actions) + 1, len(actions) + 60):
        workers[now % len(workers)].read = None
        for _ in range(3):
            workers[now % len(workers)].step(files, now)
    assert table.live(len(table.commits))["x"][2] == "by hand"
