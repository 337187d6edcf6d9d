"""What becomes of the embeddings that a run kept and did not commit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kblam_ray import storage
from kblam_ray.encoders import load_encoder
from kblam_ray.encoders.base import EncodedBatch
from kblam_ray.table.pipeline import spool

SPEC = load_encoder("hashing:64").spec


def write(uri: str, *texts: str) -> str:
    hashes = [spool.text_hash(text) for text in texts]
    return spool.write_spool(uri, spool.spool_rows(hashes, EncodedBatch(np.ones((len(texts), 64), np.float32))))


def test_a_file_that_the_store_does_not_give_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    kb = str(tmp_path / "kb")
    own = spool.spool_uri(kb, SPEC, "failed")
    write(own, "copied")
    other = write(own, "not copied, for the store did not give it")
    with pytest.raises(KeyboardInterrupt), spool.given_up_on_failure(own):
        raise KeyboardInterrupt
    read = spool.read_spool

    def fail_once(file: str, columns: Sequence[str] | None = None) -> pa.Table:
        if file == other:
            raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation")
        return read(file, columns)

    copied = pa.array([spool.text_hash("copied")], pa.binary(16))
    with monkeypatch.context() as patch:
        patch.setattr(spool, "read_spool", fail_once)
        spool.remove_used_up(spool.find_leftovers(kb, SPEC), copied)
    assert [len(leftover.files) for leftover in spool.find_leftovers(kb, SPEC)] == [2]
    Path(other).write_bytes(b"cut")
    spool.remove_used_up(spool.find_leftovers(kb, SPEC), copied)
    assert not spool.find_leftovers(kb, SPEC)


def test_what_is_kept_is_on_the_disk_before_anything_is_removed_for_it(tmp_path, monkeypatch):
    synced: list[str] = []
    monkeypatch.setattr(storage, "sync", synced.append)
    assert write(spool.spool_uri(str(tmp_path / "kb"), SPEC, "run"), "a") in synced


def test_a_process_that_fails_again_and_again_remembers_a_bounded_number_of_its_spools():
    for number in range(3_000):
        with pytest.raises(KeyboardInterrupt), spool.given_up_on_failure(f"/kb/_spool/encoder/{number}"):
            raise KeyboardInterrupt
    assert 100 < len(spool._given_up) <= 1_000
    assert spool.Leftover("/kb/_spool/encoder/2999", (), idle_s=0).is_abandoned
