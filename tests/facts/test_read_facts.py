"""Reading: every format, bad rows with their exact place, damage, and bounded memory."""

from __future__ import annotations

import datetime
import gzip
import io
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kblam_ray.errors import BadRowError
from kblam_ray.facts import Fact, FactRow, InputFile, RejectedRow, expand_inputs, read_facts
from kblam_ray.facts.json_array import array_elements
from tests.facts.samples import FACTS, ROWS, TEXT_FILES

GOOD = '{"entity": "a", "property": "b", "value": "c"}'
BOM = b"\xef\xbb\xbf"


def read(path: Path, data: bytes) -> list[FactRow | RejectedRow]:
    path.write_bytes(data)
    return list(read_facts(expand_inputs([str(path)])[0]))


def places(rows: list[FactRow | RejectedRow]) -> list[tuple[int, str]]:
    """Line and what was found there: the entity, or the reason."""
    return [(row.line, row.fact.entity if isinstance(row, FactRow) else row.reason) for row in rows]


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("bom", [b"", BOM], ids=["", "bom"])
@pytest.mark.parametrize("name", TEXT_FILES)
def test_text_formats(tmp_path: Path, name: str, bom: bytes, compressed: bool) -> None:
    data = bom + TEXT_FILES[name].encode()
    if compressed:
        name, data = name + ".gz", gzip.compress(data)
    rows = read(tmp_path / name, data)
    assert [row.fact for row in rows if isinstance(row, FactRow)] == FACTS
    assert len(rows) == len(FACTS)


def test_two_gzip_members_are_one_file(tmp_path: Path) -> None:
    data = gzip.compress(GOOD.encode() + b"\n") + gzip.compress(GOOD.encode())
    assert places(read(tmp_path / "a.jsonl.gz", data)) == [(1, "a"), (2, "a")]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "facts.parquet"
    pq.write_table(pa.Table.from_pylist([{"url": None, **row} for row in ROWS]), path)
    rows = read(path, path.read_bytes())
    assert rows == [FactRow(fact, number) for number, fact in enumerate(FACTS, start=1)]


def test_lines_where_rows_begin(tmp_path: Path) -> None:
    jsonl = f"\n{GOOD}\n  \r\n\n{GOOD}"
    assert places(read(tmp_path / "a.jsonl", jsonl.encode())) == [(2, "a"), (5, "a")]
    text = 'entity,property,value\r\n"x\r\ny",b,c\r\n\r\nz,"\n\n1",c\r\nlast,b,c'
    assert places(read(tmp_path / "a.csv", text.encode())) == [(2, "x\r\ny"), (5, "z"), (8, "last")]
    assert places(read(tmp_path / "a.json", f"[\n\n{GOOD},\n\n{GOOD}]".encode())) == [(1, "a"), (2, "a")]


def test_bad_json_lines(tmp_path: Path) -> None:
    lines = [
        GOOD.encode(),
        b'{"entity": "a", "property": "b"}',
        b'{"entity": "a\xff", "property": "b", "value": "c"}',
        b'{"entity": "a", "prop',
        b"[1, 2]",
        b'{"entity": "\\ud800", "property": "b", "value": "c"}',
        b'{"entity": "a", "property": "b", "value": 93}',
        b'{"entity": "a", "property": "b", "value": "c", "n": NaN}',
        b'{"entity": "a", "property": "b", "value": "c", "n": 1e999}',
        b'{"entity": "a", "property": "b", "value": "c", "n": ' + b"1" * 5_000 + b"}",
        b"[" * 200_000,
        GOOD.encode() + b" " + GOOD.encode(),
        GOOD.encode(),
    ]
    rows = read(tmp_path / "a.jsonl", b"\n".join(lines))
    found = places(rows)
    assert [line for line, _ in found] == list(range(1, 14))
    assert found[0] == (1, "a")
    assert found[-1] == (13, "a")
    expected = [
        "no `value`",
        "invalid UTF-8: byte 0xff at byte 14 of the line",
        "malformed JSON at column 17: Unterminated string starting",
        "a list, not an object with columns",
        "`entity` is not valid Unicode at character 1: a byte that is not UTF-8, or half of a surrogate pair",
        "`value` is a number, not text",
        "the metadata cannot be written as JSON: Out of range float values are not JSON compliant",
        "the metadata cannot be written as JSON: Out of range float values are not JSON compliant",
        "the metadata cannot be written as JSON: Out of range float values are not JSON compliant",
        "JSON nested too deeply",
        "malformed JSON at column 48: Extra data",
    ]
    assert [reason.split(": nan")[0].split(": inf")[0] for _, reason in found[1:-1]] == expected
    rejected = [row for row in rows if isinstance(row, RejectedRow)]
    assert not any(row.fatal for row in rejected)
    assert rejected[1].raw == '{"entity": "a\\xff", "property": "b", "value": "c"}'
    assert all(len(row.raw) <= 220 for row in rejected)
    json.dumps([row.raw for row in rejected]).encode()


def test_a_bad_row_as_an_error_names_file_and_line(tmp_path: Path) -> None:
    row = read(tmp_path / "a.jsonl", b"\n" + b'{"entity": "a"}')[0]
    assert isinstance(row, RejectedRow)
    error = row.to_error()
    assert isinstance(error, BadRowError)
    assert error.where == f"{tmp_path}/a.jsonl: line 2"
    assert "Help: " in str(error)
    row = read(tmp_path / "a.json", b'[{"entity": "a"}]')[0]
    assert isinstance(row, RejectedRow)
    assert row.where == f"{tmp_path}/a.json: row 1"
    assert pickle.loads(pickle.dumps(row)) == row


def test_bad_array_elements_cost_only_themselves(tmp_path: Path) -> None:
    data = f'[{GOOD}, {{"entity": "a\xff", '.encode("latin-1")
    data += (
        f'"property": "b", "value": "c"}}, 3, {{"entity": "\\udc00x", "property": "b", "value": "c"}}, {GOOD}]'.encode()
    )
    rows = read(tmp_path / "a.json", data)
    assert [(row.line, isinstance(row, FactRow)) for row in rows] == [
        (1, True),
        (2, False),
        (3, False),
        (4, False),
        (5, True),
    ]
    assert "not valid Unicode at character 2" in places(rows)[1][1]
    assert not any(row.fatal for row in rows if isinstance(row, RejectedRow))


def test_bad_csv_rows(tmp_path: Path) -> None:
    lines = [
        b"entity, property ,value,url,metadata,",
        b"a,b,c,,,",
        b"x,y",
        b"a,,c,,,",
        b"\xe9t\xe9,b,c,,,",
        b'a,"b"x,c,,,',
        b'a,b,"c ""d""",http://x,"{""k"": 1}",7',
        b'"long',
        b'",  ,c,,,',
        b"z,b,c,,free text,",
    ]
    rows = read(tmp_path / "a.csv", b"\n".join(lines))
    assert places(rows) == [
        (2, "a"),
        (3, "2 cells where the header has 6"),
        (4, "`property` is empty"),
        (5, "`entity` is not valid Unicode at character 1: a byte that is not UTF-8, or half of a surrogate pair"),
        (6, "malformed CSV: ',' expected after '\"'"),
        (7, "a"),
        (8, "`property` is empty"),
        (10, "z"),
    ]
    assert rows[5] == FactRow(Fact("a", "b", 'c "d"', '{"column 6":"7","k":1,"url":"http://x"}'), 7)
    assert rows[7] == FactRow(Fact("z", "b", "c", '{"metadata":"free text"}'), 10)
    rejected = [row for row in rows if isinstance(row, RejectedRow)]
    assert not any(row.fatal for row in rejected)
    assert rejected[3].raw == 'a,"b"x,c,,,'


def test_a_csv_value_of_a_million_characters_is_read_and_a_longer_one_rejected(tmp_path: Path) -> None:
    text = f"entity,property,value\na,b,{'v' * 1_000_000}\na,b,{'v' * 1_000_001}\na,b,{'v' * 5_000_000}\na,b,c\n"
    rows = read(tmp_path / "a.csv", text.encode())
    assert [isinstance(row, FactRow) for row in rows] == [True, False, False, True]
    assert [row.line for row in rows] == [2, 3, 4, 5]


def parquet_bytes(**columns: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


GZ = gzip.compress(f"{GOOD}\n".encode() * 10_000)

FATAL: list[tuple[str, bytes, int, int, str]] = [
    # name, data, good rows before, line, reason
    ("blank.jsonl", b"\n \n\n", 0, 1, "blank lines only"),
    ("blank.json", b" \n", 0, 1, "blank lines only"),
    ("blank.csv", b"\r\n\r\n", 0, 1, "blank lines only"),
    ("none.jsonl.gz", gzip.compress(b""), 0, 1, "the file is empty"),
    ("utf16.jsonl", GOOD.encode("utf-16"), 0, 1, "UTF-16"),
    ("zipped.csv", gzip.compress(b"entity,property,value"), 0, 1, "must end in .gz"),
    ("plain.csv.gz", b"entity,property,value\n", 0, 1, "Not a gzipped file"),
    ("crc.jsonl.gz", GZ[:-8] + b"\0" * 8, 10_000, 10_001, "CRC check failed"),
    ("breaks_off.json", f"[{GOOD}, {GOOD[:20]}".encode(), 1, 2, "breaks off"),
    ("not_closed.json", f"[{GOOD}".encode(), 0, 1, "breaks off"),
    ("broken.json", f'[{GOOD}, {{"entity": }}, {GOOD}, {GOOD}]'.encode(), 1, 2, "malformed .* Expecting value"),
    ("no_comma.json", f"[{GOOD} {GOOD}]".encode(), 1, 2, "no comma"),
    ("trailing_comma.json", f"[{GOOD},]".encode(), 1, 2, "breaks off"),
    ("more.json", f"[{GOOD}] {GOOD}".encode(), 1, 2, "follows the end"),
    ("deep.json", b"[" * 200_000, 0, 1, "nested too deeply"),
    ("semicolons.csv", b"entity;property;value\na;b;c\n", 0, 1, "none of the accepted"),
    ("lacks.csv", b"\nentity,value\na,c\n", 0, 1, "no `property`"),
    ("twice.csv", b"entity,property,value,x,x\n", 0, 1, "column `x` twice"),
    ("header.csv", b'"entity"x,property,value\n', 0, 1, "malformed CSV header"),
    (
        "open_quote.csv",
        b'entity,property,value\na,b,c\n"a,b,c\n' + b"a,b,c\n" * 9,
        1,
        3,
        "of lines 3 to 12: unexpected",
    ),
    ("inner_quote.csv", b'entity,property,value\na,b,"c\nd" e\nx,y,z"\n', 0, 2, "of lines 2 to 3"),
    (
        "endless.csv",
        b'entity,property,value\na,b,"c\n' + b"x,y,z\n" * 1_000_000,
        0,
        2,
        "field larger than field limit",
    ),
    ("not.parquet", b"PAR1 not at all", 0, 1, "damaged"),
    ("lacks.parquet", parquet_bytes(entity=["a"], value=["b"]), 0, 1, "no `property`"),
    (
        "bytes.parquet",
        parquet_bytes(entity=["a"], property=["b"], value=["c"], image=[b"x"]),
        0,
        1,
        "`image` is of type binary",
    ),
    (
        "duration.parquet",
        parquet_bytes(entity=["a"], property=["b"], value=["c"], d=[[datetime.timedelta(1)]]),
        0,
        1,
        "`d` is of type list<element: duration",
    ),
]


@pytest.mark.parametrize(("name", "data", "num_good", "line", "reason"), FATAL, ids=[case[0] for case in FATAL])
def test_damage_is_the_last_row(tmp_path: Path, name: str, data: bytes, num_good: int, line: int, reason: str) -> None:
    *good, last = read(tmp_path / name, data)
    assert all(isinstance(row, FactRow) for row in good)
    assert len(good) == num_good
    assert isinstance(last, RejectedRow)
    assert last.fatal
    assert last.line == line
    assert re.search(reason, last.reason), last.reason
    assert "Help: " in str(last.to_error())


def test_truncated_gzip_keeps_what_was_readable(tmp_path: Path) -> None:
    lines = [json.dumps({"entity": f"e{n * 7919 % 65537}", "property": "p", "value": "v"}) for n in range(50_000)]
    data = gzip.compress("\n".join(lines).encode())
    *good, last = read(tmp_path / "a.jsonl.gz", data[: len(data) * 3 // 4])
    assert isinstance(last, RejectedRow)
    assert last.fatal
    assert "ended before the end-of-stream marker" in last.reason
    assert last.line == len(good) + 1
    assert [row.fact.entity for row in good if isinstance(row, FactRow)] == [
        json.loads(line)["entity"] for line in lines[: len(good)]
    ]


def test_damaged_parquet_page(tmp_path: Path) -> None:
    texts = [f"text {n * 7919 % 65537}" for n in range(20_000)]
    table = pa.table({"entity": texts, "property": texts, "value": texts})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=5_000, use_dictionary=False, write_page_checksum=True)
    data = bytearray(sink.getvalue())
    middle = pq.ParquetFile(sink).metadata.row_group(2).column(1).data_page_offset + 1_000
    data[middle : middle + 500] = bytes(500)
    *good, last = read(tmp_path / "a.parquet", bytes(data))
    assert isinstance(last, RejectedRow)
    assert last.fatal
    assert 5_000 <= len(good) <= 10_000
    assert all(isinstance(row, FactRow) for row in good)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.json", b" [ ] "),
        ("a.csv", b"entity,property,value\n"),
        ("a.parquet", parquet_bytes(entity=pa.array([], pa.string()), description=pa.array([], pa.string()))),
    ],
)
def test_a_file_may_hold_no_facts(tmp_path: Path, name: str, data: bytes) -> None:
    assert read(tmp_path / name, data) == []


def test_parquet_metadata_types(tmp_path: Path) -> None:
    when = datetime.datetime(2024, 2, 29, 12, 30, tzinfo=datetime.UTC)
    data = parquet_bytes(
        entity=pa.array(["a", "a", None, "a"]).dictionary_encode(),
        property=pa.array(["b"] * 4, pa.large_string()),
        value=pa.array(["c", "c", "c", " "], pa.string_view()),
        day=[when.date(), None, None, None],
        at=pa.array([when, None, None, None], pa.timestamp("ms", "UTC")),
        fine=pa.array([1_000, 1_700_000_000_123_456_789, None, -1], pa.timestamp("ns", "UTC")),
        local=pa.array([1_234_567, None, None, None], pa.timestamp("ns")),
        tags=[["x", "y"], None, None, None],
        nested=[{"z": 1, "a": None}, None, None, None],
        map=pa.array([[("k", "v")], None, None, None], pa.map_(pa.string(), pa.string())),
        n=pa.array([1, 2**63, None, None], pa.uint64()),
    )
    rows = read(tmp_path / "a.parquet", data)
    metadata = [json.loads(row.fact.metadata or "") for row in rows if isinstance(row, FactRow)]
    assert metadata == [
        {
            "day": "2024-02-29",
            "at": "2024-02-29T12:30:00+00:00",
            "fine": "1970-01-01T00:00:00.000001+00:00",
            "local": "1970-01-01T00:00:00.001234567",
            "tags": ["x", "y"],
            "nested": {"z": 1, "a": None},
            "map": [["k", "v"]],
            "n": 1,
        },
        {"fine": "2023-11-14T22:13:20.123456789+00:00", "n": 2**63},
    ]
    assert places(rows)[2:] == [(3, "`entity` is null, not text"), (4, "`value` is empty")]


@pytest.mark.parametrize("type", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_text_that_is_not_utf8_costs_its_own_row(tmp_path: Path, type: pa.DataType) -> None:
    texts = pa.array([b"a", b"caf\xe9", b"c", None], pa.binary())
    size = pa.large_string() if type == pa.large_string() else pa.string()
    texts = texts.cast(pa.large_binary() if type == pa.large_string() else pa.binary())
    texts = pa.Array.from_buffers(size, len(texts), texts.buffers())
    if pa.types.is_dictionary(type):
        texts = texts.dictionary_encode()
    rows = read(tmp_path / "a.parquet", parquet_bytes(entity=texts, property=["b"] * 4, value=["c"] * 4))
    assert places(rows) == [
        (1, "a"),
        (2, "`entity` is not valid Unicode at character 4: a byte that is not UTF-8, or half of a surrogate pair"),
        (3, "c"),
        (4, "`entity` is null, not text"),
    ]
    assert isinstance(rows[1], RejectedRow)
    assert rows[1].raw == "{'entity': 'caf\\udce9', 'property': 'b', 'value': 'c'}"


def test_parquet_lists_of_text_that_is_not_utf8(tmp_path: Path) -> None:
    texts = pa.array([b"caf\xe9"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 1, texts.buffers())
    tags = pa.ListArray.from_arrays([0, 1], texts)
    (row,) = read(tmp_path / "a.parquet", parquet_bytes(entity=["a"], property=["b"], value=["c"], tags=tags))
    assert isinstance(row, RejectedRow)
    assert row.fatal
    assert "`tags` of type list<" in row.reason


def test_big_numbers_stay_exact_in_every_json(tmp_path: Path) -> None:
    row = '{"entity": "a", "property": "b", "value": "c", "n": 123456789012345678901234567890, "f": 1.50}'
    expected = '{"f":1.5,"n":123456789012345678901234567890}'
    for name, text in (("a.jsonl", row), ("a.json", f"[{row}]")):
        (only,) = read(tmp_path / name, text.encode())
        assert isinstance(only, FactRow)
        assert only.fact.metadata == expected


class DribblingText(io.StringIO):
    """Text that comes a few characters at a time, whatever is asked for: every cut is met."""

    def read(self, size: int | None = -1) -> str:
        return super().read(3)


ELEMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=200)
@given(st.lists(ELEMENTS, max_size=6), st.booleans(), st.sampled_from([None, 1]))
def test_array_elements_do_not_depend_on_where_reads_end(elements: list[Any], ascii: bool, indent: int | None) -> None:
    text = json.dumps(elements, ensure_ascii=ascii, indent=indent)
    for stream in (io.StringIO(text), DribblingText(text)):
        assert [element for element, _ in array_elements(stream)] == elements


def expand_format(name: str) -> tuple[Any, bool]:
    return name.split(".")[1], name.endswith(".gz")


@given(st.binary(max_size=60), st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.jsonl.gz", "a.parquet"]))
def test_no_bytes_make_the_reader_raise(tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str) -> None:
    path = tmp_path_factory.getbasetemp() / name
    for content in (data, b"[" + data, b"entity,property,value\n" + data):
        path.write_bytes(content)
        file = InputFile(str(path), *expand_format(name), size_bytes=len(content))
        rows = list(read_facts(file))
        assert all(not row.fatal for row in rows[:-1] if isinstance(row, RejectedRow))
        assert [row.line for row in rows] == sorted(row.line for row in rows)


PARQUET = parquet_bytes(entity=["a", "é"] * 40, property=["b"] * 80, value=["c"] * 80, tags=[["x", None]] * 80)


# The same examples each time: Parquet's own reader is not ours to search for crashes.
@settings(max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.integers(0, len(PARQUET) - 1), st.integers(0, 255), min_size=1, max_size=20))
def test_no_damage_to_parquet_makes_the_reader_raise(tmp_path: Path, changes: dict[int, int]) -> None:
    data = bytearray(PARQUET)
    for place, byte in changes.items():
        data[place] = byte
    rows = read(tmp_path / "a.parquet", bytes(data))
    assert all(not row.fatal for row in rows[:-1] if isinstance(row, RejectedRow))
    if len(rows) < 80:
        assert isinstance(rows[-1], RejectedRow)
        assert rows[-1].fatal
