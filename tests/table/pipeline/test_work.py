"""How the facts to write are cut into pieces, and their texts numbered."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from kblam_ray.table.pipeline import work
from kblam_ray.table.pipeline.scan import INDEXED_SCHEMA
from kblam_ray.table.pipeline.spool import text_hash


@given(sizes=st.lists(st.integers(0, 90), max_size=40), max_items=st.integers(1, 7))
def test_ranges_cover_everything_once_within_their_limits(sizes, max_items):
    with patch.object(work, "MAX_TEXT_BYTES", 100):
        found = work.ranges(np.array(sizes, np.int32), max_items)
    assert [place for run in found for place in range(run["start"], run["stop"])] == list(range(len(sizes)))
    for run in found:
        texts = sizes[run["start"] : run["stop"]]
        assert 1 <= len(texts) <= max_items
        assert sum(texts) <= 100


def test_an_item_over_the_limit_goes_alone():
    with patch.object(work, "MAX_TEXT_BYTES", 100):
        found = work.ranges(np.array([10, 500, 10, 10]), 9)
    assert found == [{"start": 0, "stop": 1}, {"start": 1, "stop": 2}, {"start": 2, "stop": 4}]


pairs = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("cdef")), min_size=1, max_size=20)


@given(pairs=pairs, data=st.data())
def test_each_distinct_text_has_one_number_and_its_first_user_as_owner(pairs, data):
    written = np.array(sorted(data.draw(st.sets(st.integers(0, len(pairs) - 1), min_size=1))))
    columns = {name: [0] * len(pairs) for name in INDEXED_SCHEMA.names}
    columns["content_hash"] = [bytes(16)] * len(pairs)
    columns["key_hash"] = [text_hash(key) for key, _ in pairs]
    columns["value_hash"] = [text_hash(value) for _, value in pairs]
    columns["row"] = list(range(len(pairs)))
    planned = work.plan_work(pa.table(columns, schema=INDEXED_SCHEMA), written)
    used = [text for row in written for text in pairs[row]]
    names = [planned.hashes_D[number].as_py() for number in planned.text_ids_W2.ravel()]
    assert names == [text_hash(text) for text in used]
    assert planned.owner_D.tolist() == [used.index(text) for text in dict.fromkeys(used)]
    assert planned.row_W.tolist() == written.tolist()
    placed = planned.placed(["file"], [np.arange(len(planned.file_D))[::-1]])
    assert not len(placed.unencoded())
    assert placed.place_D.tolist() == list(range(len(planned.file_D)))[::-1]
