"""The spool: embeddings of distinct texts, kept durably between the encoder and the table.

Encoding is what costs time, and money with a remote encoder. Each finished batch of texts is one Parquet
file under `_spool/` beside the table's log (a name that every Delta reader and vacuum passes over), known
by the hash of its texts. A run that dies leaves its spool; the next run with the same encoder copies what
it needs and encodes only the rest. Copying, rather than sharing, lets two runs at once clean up after
themselves without taking the other's files away.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from kblam_ray import storage
from kblam_ray.encoders.base import EncodedBatch, EncoderSpec
from kblam_ray.table.schema import pack_embeddings, unpack_embeddings

SPOOL_SCHEMA = pa.schema(
    [("text_hash", pa.binary(16)), ("embedding", pa.binary()), ("truncated", pa.bool_()), ("unknown", pa.bool_())]
)

SPOOL = "_spool"

ABANDONED_S = 3_600
"""A spool without a new file for this long belongs to a run that died; it goes once all its texts are committed."""

UNREADABLE = (OSError, pa.ArrowInvalid)
"""What reading a spool file of another run raises: the run removed it, or a crash or a full disk damaged it."""

RETENTION_S = 7 * 86_400
"""A spool that nobody continued within this time is removed."""


def text_hash(text: str) -> bytes:
    """16 bytes that stand for a text; equal only for equal texts."""
    return blake2b(text.encode("utf-8"), digest_size=16).digest()


def spool_uri(kb_uri: str, encoder: EncoderSpec, run_id: str) -> str:
    return storage.join(kb_uri, SPOOL, encoder.revision, run_id)


def write_spool(uri: str, rows: pa.Table) -> str:
    """Write rows of SPOOL_SCHEMA as one new file of the spool; returns its URI. All of it or nothing appears."""
    name = f"{uuid.uuid4().hex}.parquet"
    final = storage.join(uri, name)
    filesystem, path = storage.filesystem(final)
    with storage.storage_errors(final):
        if isinstance(filesystem, pafs.LocalFileSystem):
            filesystem.create_dir(path.rpartition("/")[0])
            # The reader lists *.parquet: a file that a killed worker left half-written never bears that name.
            with storage.whole_or_gone(f"{path}.part"):
                pq.write_table(rows, f"{path}.part", filesystem=filesystem, compression="none")
                filesystem.move(f"{path}.part", path)
            # What it was copied from is removed, and must not be gone alone after a loss of power.
            storage.sync(path)
        else:
            pq.write_table(rows, path, filesystem=filesystem, compression="none")
    return final


def spool_rows(hashes: Sequence[bytes], encoded: EncodedBatch) -> pa.Table:
    """A batch fresh from the encoder as rows of SPOOL_SCHEMA."""
    truncated, unknown = (np.zeros(len(hashes), bool) for _ in range(2))
    truncated[encoded.truncated] = True
    unknown[encoded.unknown] = True
    packed = pack_embeddings(encoded.embeddings_BP)
    return pa.table([pa.array(hashes, pa.binary(16)), packed, truncated, unknown], schema=SPOOL_SCHEMA)


def read_spool(file: str, columns: Sequence[str] | None = None) -> pa.Table:
    filesystem, path = storage.filesystem(file)
    return pq.read_table(path, filesystem=filesystem, columns=columns, partitioning=None)


def read_vectors(file: str, dim: int) -> np.ndarray:
    """The embeddings of one spool file: float16 [rows, P]."""
    with storage.storage_errors(file):
        return unpack_embeddings(read_spool(file, ["embedding"])["embedding"], dim)


_given_up: deque[str] = deque(maxlen=1_000)
"""The last ones, for a watcher may try as long as it lives; the spools of others wait until they are abandoned."""


@contextmanager
def given_up_on_failure(uri: str) -> Iterator[None]:
    """Note that nobody writes to a run's spool any more if the run fails: this process need not wait to be sure."""
    with ExitStack() as failure:
        failure.callback(_given_up.append, uri)
        yield
        failure.pop_all()


@dataclass(frozen=True)
class Leftover:
    """The spool directory of another run with the same encoder."""

    uri: str
    files: tuple[str, ...]
    idle_s: float

    @property
    def is_abandoned(self) -> bool:
        return self.idle_s > ABANDONED_S or self.uri in _given_up


def find_leftovers(kb_uri: str, encoder: EncoderSpec | None = None) -> list[Leftover]:
    """Spools of earlier (or concurrent) runs on this table, of one encoder or of all, oldest first."""
    root = storage.join(kb_uri, SPOOL, *([encoder.revision] if encoder else []))
    filesystem, path = storage.filesystem(root)
    with storage.storage_errors(root):
        infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True))
    by_run: dict[str, list[pafs.FileInfo]] = {}
    for info in infos:
        if info.type == pafs.FileType.File and info.path.endswith(".parquet"):
            by_run.setdefault(info.path.rpartition("/")[0], []).append(info)
    now = time.time()
    prefix = "s3://" if storage.is_s3(kb_uri) else ""
    leftovers = [
        Leftover(
            uri=prefix + run,
            files=tuple(sorted(prefix + info.path for info in found)),
            idle_s=now - max(info.mtime.timestamp() for info in found),
        )
        for run, found in by_run.items()
    ]
    return sorted(leftovers, key=lambda leftover: -leftover.idle_s)


def remove_used_up(leftovers: Sequence[Leftover], hashes: pa.Array | None) -> None:
    """Remove the abandoned ones of `leftovers` that hold no other text than those of `hashes`, and the old ones."""
    for leftover in leftovers:
        used_up = hashes is not None and leftover.is_abandoned and _holds_only(leftover, hashes)
        if used_up or leftover.idle_s > RETENTION_S:
            remove_spool(leftover.uri)


def _holds_only(leftover: Leftover, hashes: pa.Array) -> bool:
    for file in leftover.files:
        try:
            found = read_spool(file, ["text_hash"])["text_hash"]
        except (FileNotFoundError, pa.ArrowInvalid):
            continue  # gone, or damaged: it holds nothing
        except OSError:
            return False  # The store did not give it, this time.
        if not pc.all(pc.is_in(found, value_set=hashes)).as_py():
            return False
    return True


def remove_old_spools(kb_uri: str) -> None:
    """Remove the spools that no run has continued within RETENTION_S."""
    remove_used_up(find_leftovers(kb_uri), None)


def remove_spool(uri: str) -> None:
    """Remove a run's spool directory; one that is gone already is no error."""
    filesystem, path = storage.filesystem(uri)
    with storage.storage_errors(uri):
        try:
            filesystem.delete_dir(path)
        except OSError:
            # Another run that cleans up may be faster.
            if filesystem.get_file_info(path).type != pafs.FileType.NotFound:
                raise
