"""Texts in need of no fact: from files in several forms, or made here; number i is always the same."""

from __future__ import annotations

import gzip
import json

import pytest
from training.mix_samples import make, of_kind

from kblam_ray.errors import BadRowError, InputError, StorageError
from kblam_ray.training.mix.examples import TEXT
from kblam_ray.training.mix.texts import Texts, read_texts


def test_built_in_texts_depend_on_seed_and_number():
    texts, again, other = Texts([], 1), Texts([], 1), Texts([], 2)
    made = [texts[number] for number in range(300)]
    assert made == [again[number] for number in range(300)]
    assert made != [other[number] for number in range(300)]
    assert len({text.reply for text in made}) > 150
    for text in made:
        assert text.reply.strip()
        assert text.messages[-1]["role"] == "user"


def test_files_of_every_form(tmp_path):
    plain = tmp_path / "book.txt"
    plain.write_text("First line\nof a text.\n\n\nSecond text.\n", encoding="utf-8")
    rows = [
        {"text": "A text — 文"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    ]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    zipped = tmp_path / "more.jsonl.gz"
    zipped.write_bytes(gzip.compress(json.dumps({"text": "Zipped"}).encode()))
    found = read_texts([str(plain), str(lines), str(zipped)])
    assert [text.reply for text in found] == ["First line of a text.", "Second text.", "A text — 文", "Hello", "Zipped"]
    assert found[3].messages == ({"role": "user", "content": "Hi"},)
    drawn = {Texts(found, 0)[number].reply for number in range(100)}
    assert drawn == {text.reply for text in found}


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '{"words": "x"}',
        '{"text": 3}',
        '{"text": " "}',
        '{"messages": [{"role": "user", "content": "Hi"}]}',
        '{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "x"}]}',
        "[1]",
    ],
)
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "good"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(BadRowError, match="line 2"):
        read_texts([str(path)])


def test_files_without_text(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(InputError, match="without any text"):
        read_texts([str(tmp_path / "empty.txt")])
    with pytest.raises(BadRowError, match="UTF-8"):
        read_texts([str(tmp_path / "latin.txt")])
    with pytest.raises(StorageError):
        read_texts([str(tmp_path / "none.txt")])


def test_examples_read_given_texts(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("All my bags are packed.\n\n" + "word " * 5_000, encoding="utf-8")
    maker = make(texts=read_texts([str(path)]), text_share=0.5, batch_size=8, max_tokens=300)
    decoded = [maker.chat.tokenizer.decode(example.input_ids) for example in of_kind(maker, TEXT, 12)]
    assert any("All my bags are packed." in text for text in decoded)
    assert all("All my bags" in text or "word word" in text for text in decoded)
    assert max(len(example.input_ids) for example in of_kind(maker, TEXT, 12)) == 300
