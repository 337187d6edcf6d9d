"""The same three facts as rows, as facts, and as a file of every text format."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from kblam_ray.facts import Fact

ROWS: list[dict[str, Any]] = [
    {"entity": "Perú", "property": "capital", "value": "Lima"},
    {"entity": "東京", "property": "説明", "value": 'the "capital",\nof\tJapan 🗼', "url": "http://x"},
    {"entity": "القاهرة", "property": "b", "value": "c"},
]
FACTS = [
    Fact("Perú", "capital", "Lima"),
    Fact("東京", "説明", 'the "capital",\nof\tJapan 🗼', '{"url":"http://x"}'),
    Fact("القاهرة", "b", "c"),
]


def as_csv(delimiter: str, line_end: str) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["entity", "property", "value", "url"], delimiter=delimiter, lineterminator=line_end)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue()


TEXT_FILES = {
    "facts.json": json.dumps(ROWS, ensure_ascii=False),
    "indented.json": "\n " + json.dumps(ROWS, indent=2) + "\n\n",
    "lines.json": "\n".join(map(json.dumps, ROWS)),
    "facts.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "crlf.ndjson": "\r\n".join(map(json.dumps, ROWS)) + "\r\n",
    "facts.csv": as_csv(",", "\n"),
    "crlf.csv": as_csv(",", "\r\n"),
    "old_mac.csv": as_csv(",", "\r"),
    "facts.tsv": as_csv("\t", "\n"),
}
