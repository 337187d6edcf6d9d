"""The state object: read as it was written, replaced whole, and never taken for empty when it cannot be read."""

from __future__ import annotations

import json
import os
import threading

import boto3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kblam_ray.errors import InputError, StorageError
from kblam_ray.serving.registry import State, StateStore
from kblam_ray.serving.wanted import KbSpec

STATE = State({"a": KbSpec("/tables/a", 3), "b.c-d_e": KbSpec("s3://bucket/b")}, {"a": KbSpec("/tables/a")})


@pytest.fixture(params=["local", "s3"])
def uri(request, tmp_path) -> str:
    if request.param == "local":
        return str(tmp_path / "folder" / "state.json")
    return request.getfixturevalue("s3_uri") + "/folder/state.json"


def put(uri: str, content: bytes) -> None:
    """Place an object as somebody else would."""
    if uri.startswith("s3://"):
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=content)
    else:
        os.makedirs(os.path.dirname(uri), exist_ok=True)
        with open(uri, "wb") as file:
            file.write(content)


def test_what_is_written_is_read(uri):
    assert StateStore(uri).read() is None
    StateStore(uri).write(STATE)
    assert StateStore(uri).read() == STATE
    StateStore(uri).write(State())
    assert StateStore(uri).read() == State()


def test_nowhere():
    store = StateStore(None)
    store.write(STATE)
    assert store.read() is None
    assert not store.is_durable


def test_the_object_is_json_that_a_person_can_read(uri):
    StateStore(uri).write(STATE)
    put(uri, json.dumps({"format": 1, "knowledge_bases": {"hand": {"uri": "/by/hand", "version": None}}}).encode())
    assert StateStore(uri).read() == State({"hand": KbSpec("/by/hand")})


@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
        st.builds(KbSpec, st.sampled_from(["/t/a", "s3://b/ü x", "/t/'\"\\"]), st.none() | st.integers(0, 2**62)),
        max_size=5,
    )
)
def test_any_state_survives(specs):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        StateStore(f"{folder}/state.json").write(State(specs))
        assert StateStore(f"{folder}/state.json").read() == State(specs)


def entry(**fields) -> bytes:
    return json.dumps({"format": 1, "knowledge_bases": {"a": {"uri": "/t", "version": None, **fields}}}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00garbage",
        b"[" * 100_000,
        b"null",
        b"[]",
        b"{}",
        b'{"format": "1", "knowledge_bases": {}}',
        b'{"format": true, "knowledge_bases": {}}',
        b'{"format": 0, "knowledge_bases": {}}',
        b'{"format": 1}',
        b'{"format": 1, "knowledge_bases": []}',
        b'{"format": 1, "knowledge_bases": {}, "more": 1}',
        b'{"format": 1, "knowledge_bases": {}, "given": null}',
        b'{"format": 1, "knowledge_bases": {"a": "/t"}}',
        b'{"format": 1, "knowledge_bases": {"a": {"uri": "/t"}}}',
        b'{"format": 1, "knowledge_bases": {"../a": {"uri": "/t", "version": null}}}',
        entry(version="3"),
        entry(version=-1),
        entry(version=True),
        entry(version=1.0),
        entry(uri=""),
        entry(uri=None),
        entry(uri="gs://bucket/t"),
        entry(extra=1),
        json.dumps({"format": 1, "knowledge_bases": {}, "given": {}}).encode() + b" " * 16_000_001,
        entry()[:-4],
    ],
)
def test_a_damaged_object_says_so_and_is_left_as_it_is(tmp_path, content):
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"the state object is damaged: .+state\.json.+Help: restore") as caught:
        StateStore(str(path)).read()
    assert len(str(caught.value)) < 1_000
    assert path.read_bytes() == content


def test_a_damaged_object_in_a_store(uri):
    put(uri, entry()[:20])
    with pytest.raises(StorageError, match="damaged"):
        StateStore(uri).read()


def test_a_newer_format_says_so(uri):
    put(uri, b'{"format": 2, "anything": []}')
    with pytest.raises(StorageError, match="has format 2, and this version knows 1"):
        StateStore(uri).read()


@pytest.mark.parametrize("bad", ["", "gs://bucket/state.json", "s3://bucket", "s3://bucket/", "s3:///state.json"])
def test_places_that_are_none(bad):
    with pytest.raises(InputError):
        StateStore(bad)


def test_a_folder_is_no_state(tmp_path):
    with pytest.raises(InputError, match="this is a folder"):
        StateStore(str(tmp_path)).read()


def test_a_place_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    store = StateStore(str(tmp_path / "file" / "state.json"))
    with pytest.raises(StorageError, match="cannot read or write"):
        store.read()
    with pytest.raises(StorageError, match="cannot read or write"):
        store.write(STATE)


def test_a_write_that_fails_leaves_the_old_state_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    StateStore(str(path)).write(STATE)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            StateStore(str(path)).write(State())
    assert StateStore(str(path)).read() == STATE
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]


def test_the_new_file_is_on_the_disk_before_it_takes_the_name_and_the_name_before_write_returns(tmp_path, monkeypatch):
    path, done = tmp_path / "state.json", []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (done.append(os.readlink(f"/proc/self/fd/{descriptor}")), fsync(descriptor))
    )
    monkeypatch.setattr(os, "replace", lambda source, target: (done.append("rename"), rename(source, target)))
    StateStore(str(path)).write(STATE)
    assert done[0].startswith(f"{tmp_path}/.state.json.")
    assert done[1] == "rename"
    assert str(tmp_path) in done[2:]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "state.json").symlink_to(tmp_path / "disk" / "real.json")
    StateStore(str(tmp_path / "state.json")).write(STATE)
    assert (tmp_path / "state.json").is_symlink()
    assert StateStore(str(tmp_path / "disk" / "real.json")).read() == STATE


def test_two_writers_and_a_reader_see_whole_states_only(tmp_path):
    path = str(tmp_path / "state.json")
    states = [State({f"kb{i}": KbSpec(f"/{writer}/{'x' * 500}", i) for i in range(40)}) for writer in range(2)]
    StateStore(path).write(states[0])
    writers = [
        threading.Thread(target=lambda state=state: [StateStore(path).write(state) for _ in range(50)])
        for state in states
    ]
    for writer in writers:
        writer.start()
    num_read = 0
    while any(writer.is_alive() for writer in writers) or num_read < 10:
        assert StateStore(path).read() in states
        num_read += 1
    for writer in writers:
        writer.join()
    assert StateStore(path).read() in states
    assert os.listdir(tmp_path) == ["state.json"]


def test_on_s3_one_put_replaces_the_object(s3_uri):
    uri = f"{s3_uri}/state.json"
    StateStore(uri).write(STATE)
    found = boto3.client("s3").head_object(Bucket=s3_uri.removeprefix("s3://"), Key="state.json")
    assert "-" not in found["ETag"], "uploaded in parts"
    assert found["ContentType"] == "application/json"


def test_no_bucket(s3_uri):
    with pytest.raises(StorageError, match="cannot read or write"):
        StateStore("s3://no-such-bucket-anywhere/state.json").write(STATE)


@pytest.mark.timeout(120)
def test_a_store_that_does_not_answer(s3_uri, monkeypatch):
    uri = f"{s3_uri}/state.json"
    StateStore(uri).write(STATE)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(StorageError, match=r"cannot read or write.*AWS_ENDPOINT_URL"):
            StateStore(uri).read()
        with pytest.raises(StorageError, match=r"cannot read or write.*AWS_ENDPOINT_URL"):
            StateStore(uri).write(State())
    assert StateStore(uri).read() == STATE
