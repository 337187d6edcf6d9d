"""Opening a table says clearly what is wrong; a commit is atomic and happens once, and encoders do not mix."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import deltalake
import pyarrow as pa
import pytest
from rows import INFO, commit_upserts, upsert_part

from kblam_ray.errors import EncoderMismatchError, InputError, StorageError, TableError, TableNotFoundError
from kblam_ray.facts.fact import Fact, fact_id
from kblam_ray.table import log as log_module
from kblam_ray.table.log import TableLog, commit_parts, newest_updated_at, next_updated_at
from kblam_ray.table.schema import SCHEMA, TableInfo, new_write_id

FACTS = [Fact("France", "capital", "Paris"), Fact("Spain", "capital", "Madrid")]
NOW = time.time_ns() // 1_000


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "a knowledge base é")


def test_a_written_part_is_invisible_until_committed(uri):
    write_id = new_write_id()
    part = upsert_part(uri, FACTS, NOW, write_id)
    assert TableLog.open_if_exists(uri) is None
    assert commit_parts(uri, INFO, [part], write_id) == 0
    assert [file.path for file in TableLog.open(uri).files] == [part.path]


def test_the_log_knows_the_ranges_of_a_file_without_reading_it(uri):
    commit_upserts(uri, FACTS, NOW)
    file = TableLog.open(uri).files[0]
    os.unlink(Path(uri) / file.path)
    assert file.num_rows == 2
    assert [file.min_id, file.max_id] == sorted(fact_id(fact) for fact in FACTS)
    assert file.min_updated_at == file.max_updated_at == newest_updated_at(uri) == NOW


def test_the_next_write_comes_after_every_row_even_from_a_clock_that_is_ahead(uri):
    assert next_updated_at(uri) >= NOW
    ahead = NOW + 3_600_000_000
    commit_upserts(uri, FACTS, ahead)
    assert next_updated_at(uri) == ahead + 1


def test_committing_a_write_again_finds_its_version(uri):
    write_id = new_write_id()
    parts = [upsert_part(uri, FACTS, NOW, write_id)]
    assert commit_parts(uri, INFO, parts, write_id) == 0
    assert commit_upserts(uri, FACTS[:1], NOW + 1) == 1
    assert commit_parts(uri, INFO, parts, write_id) == 0
    assert TableLog.open(uri).version == 1


def test_a_commit_whose_answer_is_lost_is_not_made_twice(uri, monkeypatch):
    commit_upserts(uri, FACTS, NOW)
    append = log_module._append

    def append_and_lose_the_answer(*args):
        append(*args)
        raise OSError("connection reset")

    monkeypatch.setattr(log_module, "_append", append_and_lose_the_answer)
    assert commit_upserts(uri, FACTS[:1], NOW + 1) == 1
    assert TableLog.open(uri).version == 1


def test_a_commit_that_never_lands_is_an_error_and_leaves_the_table(uri, monkeypatch):
    commit_upserts(uri, FACTS, NOW)

    def refuse(*args):
        raise OSError("disk full")

    monkeypatch.setattr(log_module, "_append", refuse)
    with pytest.raises(StorageError, match=r"disk full.*Help:"):
        commit_upserts(uri, FACTS[:1], NOW + 1)
    assert TableLog.open(uri).version == 0


def test_the_loser_of_the_race_to_create_appends(uri, monkeypatch):
    create = log_module._create

    def lose(*args):
        monkeypatch.setattr(log_module, "_create", create)
        commit_upserts(uri, FACTS[:1], NOW)
        create(*args)

    monkeypatch.setattr(log_module, "_create", lose)
    assert commit_upserts(uri, FACTS[1:], NOW) == 1
    assert len(TableLog.open(uri).files) == 2


def test_the_loser_with_another_encoder_is_refused(uri, monkeypatch):
    create = log_module._create
    other = INFO.model_copy(update={"encoder": INFO.encoder.model_copy(update={"revision": "r2"})})

    def lose(*args):
        monkeypatch.setattr(log_module, "_create", create)
        commit_parts(uri, other, [upsert_part(uri, FACTS, NOW, "w")], "w")
        create(*args)

    monkeypatch.setattr(log_module, "_create", lose)
    with pytest.raises(EncoderMismatchError, match=r"revision r2.*revision r1"):
        commit_upserts(uri, FACTS, NOW)
    assert TableLog.open(uri).version == 0


def test_another_identity_rule_is_refused(uri):
    commit_upserts(uri, FACTS, NOW)
    other = INFO.model_copy(update={"identity": "entity,property,value"})
    with pytest.raises(TableError, match="--identity entity,property"):
        commit_parts(uri, other, [upsert_part(uri, FACTS, NOW, "w")], "w")


def test_the_same_encoder_under_another_name_is_accepted(uri):
    commit_upserts(uri, FACTS, NOW)
    other = INFO.model_copy(update={"encoder": INFO.encoder.model_copy(update={"name": "/models/fake"})})
    assert commit_parts(uri, other, [upsert_part(uri, FACTS, NOW, "w")], "w") == 1


def test_a_write_that_outlived_the_delete_rows_is_refused(uri):
    commit_upserts(uri, FACTS, NOW)
    with pytest.raises(TableError, match=r"150 hours ago.*Help: run it again"):
        commit_upserts(uri, FACTS, NOW - 150 * 3_600_000_000)


@pytest.mark.parametrize("version", [1, 99, -1])
def test_a_missing_version_is_named_with_the_newest(uri, version):
    commit_upserts(uri, FACTS, NOW)
    with pytest.raises(TableNotFoundError, match=f"no version {version} .*its newest is 0"):
        TableLog.open(uri, version)


def test_no_table(uri, tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (uri, str(tmp_path), str(tmp_path / "file")):
        with pytest.raises(TableNotFoundError, match="there is no table"):
            TableLog.open(place)
        with pytest.raises(TableNotFoundError):
            TableLog.open(place, 0)


def foreign(uri: str, description: str | None, schema: pa.Schema = SCHEMA) -> str:
    deltalake.write_deltalake(uri, schema.empty_table(), description=description)
    return uri


@pytest.mark.parametrize("description", [None, "sales figures", "[1]", '{"format_version": "one"}', '"x"', "{}"])
def test_a_foreign_table_is_refused(uri, description):
    with pytest.raises(TableError, match="not one of kblam-ray's"):
        TableLog.open(foreign(uri, description))


def test_a_newer_format_is_refused(uri):
    newer = {**INFO.model_dump(), "format_version": 2, "shape": "unknown to us"}
    with pytest.raises(TableError, match=r"format 2; this kblam-ray reads up to 1.*newer kblam-ray"):
        TableLog.open(foreign(uri, json.dumps(newer)))


@pytest.mark.parametrize("damage", [{"encoder": None}, {"identity": "entity"}])
def test_a_damaged_description_is_refused(uri, damage):
    with pytest.raises(TableError, match="description is damaged"):
        TableLog.open(foreign(uri, json.dumps({**INFO.model_dump(), **damage})))


def test_missing_columns_are_refused(uri):
    schema = pa.schema([field for field in SCHEMA if field.name != "write_id"])
    with pytest.raises(TableError, match="lacks columns"):
        TableLog.open(foreign(uri, INFO.model_dump_json(), schema))


@pytest.mark.parametrize("garbage", ["garbage{", "", '{"add": 5}\n'])
def test_a_corrupted_log_is_one_clear_line(uri, garbage):
    commit_upserts(uri, FACTS, NOW)
    (Path(uri) / "_delta_log" / f"{0:020d}.json").write_text(garbage)
    with pytest.raises(TableError, match="log cannot be read") as caught:
        TableLog.open(uri)
    assert "\n" not in str(caught.value)
    assert "unknown>" not in str(caught.value)


@pytest.mark.parametrize("name", ["100%", "a%20b", "a[1]", "a|b", "a\\b", "a\nb"])
def test_locations_that_deltalake_would_misread_are_refused(tmp_path, name):
    with pytest.raises(InputError, match="cannot stand in a table's location"):
        TableLog.open(f"{tmp_path}/{name}")


def test_a_place_that_cannot_be_looked_at_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match=r"File name too long.*Help:"):
        TableLog.open(str(tmp_path / ("a" * 300)))


def test_an_unwritable_target_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"cannot read or write.*Help:"):
        commit_upserts(str(tmp_path / "file" / "kb"), FACTS, NOW)


@pytest.mark.parametrize("num_columns_with_statistics", [0, 32])
def test_files_rewritten_by_another_program_do_not_hide_the_newest_row(uri, num_columns_with_statistics):
    """deltalake itself writes statistics in whole milliseconds, or none at all if the table says so."""
    newest = NOW - NOW % 1_000 + 7
    commit_upserts(uri, FACTS, newest)
    commit_upserts(uri, FACTS[:1], newest - 5)
    delta = deltalake.DeltaTable(uri)
    delta.alter.set_table_properties({"delta.dataSkippingNumIndexedCols": str(num_columns_with_statistics)})
    delta.optimize.compact()
    assert newest <= newest_updated_at(uri) < newest + 1_000


def test_info_round_trips_through_the_description(uri):
    commit_upserts(uri, FACTS, NOW)
    assert TableInfo.model_validate_json(deltalake.DeltaTable(uri).metadata().description) == INFO
    assert TableLog.open(uri).info == INFO


def test_a_commit_is_on_the_disk_before_it_is_answered(uri, monkeypatch):
    """Parts first, then the log entry that names them: a loss of power between leaves the table as it was."""
    synced: list[int] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    commit_upserts(uri, FACTS, NOW)

    def number_of(path: Path) -> int:
        return path.stat().st_ino

    table = Path(uri)
    part, entry = table / TableLog.open(uri).files[0].path, table / "_delta_log" / f"{0:020}.json"
    assert synced.index(number_of(part)) < synced.index(number_of(entry))
    assert {number_of(folder) for folder in (table, table / "_delta_log", table.parent)} <= set(synced)


def test_a_version_that_is_far_away_is_refused_at_once(uri):
    commit_upserts(uri, FACTS, NOW)
    with pytest.raises(TableNotFoundError, match=r"no version 9007199254740991 .* newest is 0"):
        TableLog.open(uri, 2**53 - 1)
