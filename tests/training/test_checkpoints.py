"""Checkpoints: whole or not there, on local disk and on S3, whatever happens while they are written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kblam_ray import storage
from kblam_ray.errors import StorageError, TrainingError
from kblam_ray.training.checkpoints import MANIFEST, CheckpointStore, require_same


def filler(text: str):
    def fill(folder: Path) -> None:
        (folder / "part").mkdir()
        (folder / "part" / "tensors").write_text(text * 1000)
        (folder / "state.json").write_text(json.dumps({"text": text}))

    return fill


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"{request.getfixturevalue('s3_uri')}/run"


def read(store: CheckpointStore) -> str:
    newest = store.newest()
    assert newest is not None
    with newest.folder() as folder:
        assert (folder / "part" / "tensors").exists()
        return json.loads((folder / "state.json").read_text())["text"]


def test_the_newest_is_found_and_the_oldest_go(place):
    store = CheckpointStore(place, keep=2)
    assert store.newest() is None
    for step in (0, 5, 10, 200):
        assert store.save(step, filler(f"at {step}")).step == step
    assert store.steps() == [10, 200]
    assert read(CheckpointStore(place)) == "at 200"


def test_a_step_that_is_done_again_replaces(place):
    store = CheckpointStore(place)
    store.save(5, filler("first"))
    store.save(5, filler("second"))
    assert store.steps() == [5]
    assert read(store) == "second"


def write(uri: str, content: bytes) -> None:
    files, path = storage.filesystem(uri)
    with files.open_output_stream(path) as stream:
        stream.write(content)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("part/tensors", b"at 5" * 500, "2000 of 4000 bytes"),
        ("part/tensors", b"at 6" * 1000, "is damaged"),
        (MANIFEST, b'{"files": {', "manifest is damaged"),
        (MANIFEST, b"[]", "manifest is damaged"),
        (None, b"", "no manifest"),
        ("gone", b"", "is missing"),
    ],
)
def test_a_torn_one_is_skipped_with_a_warning(place, name, content, why, caplog):
    store = CheckpointStore(place)
    store.save(4, filler("at 4"))
    made = store.save(5, filler("at 5"))
    files, path = storage.filesystem(made.uri)
    if name is None:
        files.delete_file(f"{path}/{MANIFEST}")
    elif name == "gone":
        files.delete_file(f"{path}/part/tensors")
    else:
        write(storage.join(made.uri, name), content)
    assert read(store) == "at 4"
    assert why in caplog.text


def test_a_failure_while_it_is_filled_leaves_nothing_of_it(place):
    store = CheckpointStore(place)
    store.save(1, filler("at 1"))

    def fail(folder: Path) -> None:
        filler("at 2")(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        store.save(2, fail)
    assert store.steps() == [1]
    assert read(store) == "at 1"
    if not storage.is_s3(place):
        assert [path.name for path in Path(place).iterdir()] == ["step-00000001"]


def test_what_a_killed_process_left_goes_with_the_next(tmp_path):
    left = tmp_path / ".step-00000007.0123456789ab.partial"
    left.mkdir()
    (left / "tensors").write_text("half")
    store = CheckpointStore(str(tmp_path))
    assert store.newest() is None
    store.save(8, filler("at 8"))
    assert os.listdir(tmp_path) == ["step-00000008"]


def test_settings_that_differ_are_named():
    saved = {"steps": 10, "tables": [["kb", 0]], "old": 1}
    require_same(saved, dict(saved), where="here")
    with pytest.raises(TrainingError, match=r"old was 1 and is None; steps was 10 and is 20"):
        require_same(saved, {"steps": 20, "tables": [["kb", 0]]}, where="here")
