"""Which rows a run writes and which distinct texts it needs, as arrays that every worker can share.

Texts are numbered in the order of their first use, so the texts of neighbouring facts stand in few spool
files, and each has one owner: the row that hands it to the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

UNENCODED = -1


@dataclass(frozen=True)
class Work:
    """The rows to write (W of them, ascending by `seq`) and their texts (D distinct ones).

    Attributes:
        seqs_W: int64, the rows' places in the input.
        text_ids_W2: int64 [W, 2], the numbers of each row's key text and value text.
        owners_W2: bool [W, 2], whether this row is the first to use the text.
        hashes_D: 16-byte hash of each text.
        file_D, row_D: where each text's embedding stands in the spool; UNENCODED until it does.
        files: URIs of the spool files.
    """

    seqs_W: np.ndarray
    text_ids_W2: np.ndarray
    owners_W2: np.ndarray
    hashes_D: pa.Array
    file_D: np.ndarray
    row_D: np.ndarray
    files: tuple[str, ...] = ()

    @property
    def num_texts(self) -> int:
        return len(self.file_D)

    @property
    def num_unencoded(self) -> int:
        return int((self.file_D == UNENCODED).sum())

    def rows_of(self, seqs_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For a batch of the scan: which of its rows are to be written, and their numbers in W."""
        at_B = np.searchsorted(self.seqs_W, seqs_B)
        at_B[at_B == len(self.seqs_W)] = 0
        is_written_B = self.seqs_W[at_B] == seqs_B
        return np.flatnonzero(is_written_B), at_B[is_written_B]

    def placed(self, files: list[str], text_ids: list[np.ndarray]) -> Work:
        """The same work, knowing that spool file `files[i]` holds the texts `text_ids[i]` in that order.

        A text may stand in several files (a worker that was killed after writing ran again): one place is kept.
        """
        file_D, row_D = self.file_D.copy(), self.row_D.copy()
        for number, ids in enumerate(text_ids):
            file_D[ids] = number
            row_D[ids] = np.arange(len(ids))
        return replace(self, file_D=file_D, row_D=row_D, files=tuple(files))


def plan_work(index: pa.Table, written: np.ndarray) -> Work:
    """Number the distinct texts of the rows to write.

    Args:
        index: the scan's index, with `seq`, `key_hash` and `value_hash`.
        written: row numbers into the index, ascending and at least one.
    """
    rows = index.select(["seq", "key_hash", "value_hash"]).take(written)
    both = pa.concat_arrays([*rows["key_hash"].chunks, *rows["value_hash"].chunks])
    # Interleaved, key before value: texts then get their numbers in the order in which rows use them.
    interleaved = both.take(np.arange(2 * len(rows)).reshape(2, -1).T.ravel())
    encoded = pc.dictionary_encode(interleaved)
    text_ids_W2 = encoded.indices.to_numpy().astype(np.int64).reshape(-1, 2)
    owners_W2 = np.zeros(text_ids_W2.size, bool)
    owners_W2[np.unique(text_ids_W2, return_index=True)[1]] = True
    num_texts = len(encoded.dictionary)
    return Work(
        seqs_W=rows["seq"].to_numpy(),
        text_ids_W2=text_ids_W2,
        owners_W2=owners_W2.reshape(-1, 2),
        hashes_D=encoded.dictionary,
        file_D=np.full(num_texts, UNENCODED, np.int32),
        row_D=np.full(num_texts, UNENCODED, np.int32),
    )
