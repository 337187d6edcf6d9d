"""Embed each distinct text once, on an autoscaling pool of encoder actors, into the spool."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kblam_ray.encoders import load_encoder
from kblam_ray.encoders.base import Encoder
from kblam_ray.table.pipeline.reports import reporting, reports
from kblam_ray.table.pipeline.scan import TASK_CPUS, Block
from kblam_ray.table.pipeline.spool import UNREADABLE, Leftover, read_spool, spool_rows, text_hash, write_spool
from kblam_ray.table.pipeline.work import Work, ranges

if TYPE_CHECKING:
    from ray import ObjectRef

    from kblam_ray.encoders import EncoderSettings

ENCODER_CPUS = 0.75
"""Logical CPUs of an encoder actor. A pool that asks for all CPUs waits forever for whatever else must run."""

MAX_SPOOL_FILE_BYTES = 6_000_000


@dataclass(frozen=True)
class Spooled:
    """A worker's report of one spool file: the texts in it, by number, and what the encoder noticed of them."""

    file: str
    text_ids: np.ndarray
    truncated_ids: np.ndarray
    unknown_ids: np.ndarray
    truncated_example: str | None = None
    unknown_example: str | None = None
    tokens: int = 0
    cost_usd: float = 0.0


@dataclass
class EncodeReport:
    """What the encoder noticed over a run; an example is the first text of its kind."""

    texts_embedded: int = 0
    texts_resumed: int = 0
    texts_truncated: int = 0
    truncated_example: str | None = None
    texts_with_unknown_tokens: int = 0
    unknown_example: str | None = None
    tokens: int = 0
    cost_usd: float = 0.0
    spooled: list[Spooled] = field(default_factory=list)

    def add(self, batch: Spooled) -> None:
        self.spooled.append(batch)
        self.texts_truncated += len(batch.truncated_ids)
        self.truncated_example = self.truncated_example or batch.truncated_example
        self.texts_with_unknown_tokens += len(batch.unknown_ids)
        self.unknown_example = self.unknown_example or batch.unknown_example
        self.tokens += batch.tokens
        self.cost_usd += batch.cost_usd

    def place(self, work: Work) -> Work:
        """The work, knowing where every text spooled so far stands."""
        return work.placed([batch.file for batch in self.spooled], [batch.text_ids for batch in self.spooled])


@dataclass(frozen=True)
class Pool:
    """How many encoder actors there are, and what each takes."""

    min_workers: int
    max_workers: int
    gpus_per_worker: float


def resume_from(leftovers: list[Leftover], work: Work, spool: str, report: EncodeReport) -> Work:
    """Copy the texts of this work that other runs have embedded already into this run's spool, each once."""
    import ray

    files = [file for leftover in leftovers for file in leftover.files]
    if not files:
        return work

    def run(task: Callable[..., Any], *known: Any) -> Iterator[Any]:
        kwargs = {"known_ref": ray.put((work, *known)), "spool": spool}
        items = ray.data.from_items([{"file": file} for file in files])
        return reports(items.map_batches(task, batch_size=1, fn_kwargs=kwargs, num_cpus=TASK_CPUS))

    # A run that was continued has left its texts in both spools. Were all of them copied, every further run that dies
    # would leave twice as much as the one before.
    source_of_D: np.ndarray = np.full(len(work.file_D), -1, np.int32)
    sources: dict[str, int] = {}
    for found in run(_find_spooled):
        source_of_D[found.text_ids] = sources.setdefault(found.file, len(sources))
    is_truncated_D, is_unknown_D = np.zeros((2, len(work.file_D)), bool)
    for copied in run(_copy_spooled, source_of_D, sources):
        report.spooled.append(copied)
        is_truncated_D[copied.truncated_ids] = True
        is_unknown_D[copied.unknown_ids] = True
    work = report.place(work)
    report.texts_truncated += int(is_truncated_D.sum())
    report.texts_with_unknown_tokens += int(is_unknown_D.sum())
    report.texts_resumed += len(work.file_D) - len(work.unencoded())
    return work


@dataclass(frozen=True)
class _Found:
    """A worker's report of the spool file of another run: which of the work's texts it holds."""

    file: str
    text_ids: np.ndarray


@reporting
def _find_spooled(batch: dict[str, np.ndarray], known_ref: ObjectRef, spool: str) -> _Found | None:
    import ray

    work, *_ = ray.get(known_ref)
    file = str(batch["file"][0])
    try:
        hashes = read_spool(file, ["text_hash"])["text_hash"].combine_chunks()
    except UNREADABLE:
        return None  # Its texts are simply encoded here.
    text_ids = pc.index_in(hashes, value_set=work.hashes_D).drop_null()
    return _Found(file, text_ids.to_numpy().astype(np.int64)) if len(text_ids) else None


@reporting
def _copy_spooled(batch: dict[str, np.ndarray], known_ref: ObjectRef, spool: str) -> Spooled | None:
    import ray

    work, source_of_D, sources = ray.get(known_ref)
    file = str(batch["file"][0])
    if file not in sources:
        return None
    try:
        rows = read_spool(file)
    except UNREADABLE:
        return None
    text_ids = pc.fill_null(pc.index_in(rows["text_hash"].combine_chunks(), value_set=work.hashes_D), -1).to_numpy()
    at = np.flatnonzero((text_ids >= 0) & (source_of_D[text_ids] == sources[file]))
    if not len(at):
        return None
    rows, ids = rows.take(pa.array(at)), text_ids[at].astype(np.int64)
    truncated, unknown = (ids[rows[name].to_numpy()] for name in ("truncated", "unknown"))
    return Spooled(write_spool(spool, rows), ids, truncated, unknown)


def encode_texts(
    blocks: Sequence[Block],
    work: Work,
    settings: EncoderSettings,
    dim: int,
    pool: Pool,
    spool: str,
    report: EncodeReport,
) -> Work:
    """Embed the work's texts that have no embedding yet; returns the work knowing where each one stands.

    Args:
        blocks: the scanned input.
        settings: how a worker loads its encoder.
        dim: P, for the size of a spool file.
        spool: URI of this run's spool directory.
        report: what was noticed is added to it.
    """
    import ray

    text_ids = work.unencoded()
    if not len(text_ids):
        return work
    batch_size = texts_per_batch(len(text_ids), pool.max_workers, dim)
    # A batch is a pair of numbers, and workers fetch the texts themselves: so batches have one size, whatever the
    # blocks' sizes are, and no task has to run beside the pool and compete with it for CPUs.
    batches = ranges(work.text_bytes_W[work.owner_D[text_ids] // 2], batch_size)
    encoded = ray.data.from_items(batches, override_num_blocks=len(batches)).map_batches(
        _EncodeTexts,
        batch_size=1,
        fn_constructor_kwargs={
            "blocks": list(blocks),
            "work_ref": ray.put((work, text_ids)),
            "settings": settings,
            "spool": spool,
        },
        compute=ray.data.ActorPoolStrategy(
            min_size=min(pool.min_workers, len(batches)), max_size=min(pool.max_workers, len(batches))
        ),
        num_cpus=ENCODER_CPUS,
        num_gpus=pool.gpus_per_worker or None,
    )
    from tqdm import tqdm

    # On a terminal the bar moves; in a log each update is a line, so there it speaks rarely.
    interval_s = 0.2 if sys.stderr.isatty() else 5.0
    with tqdm(total=len(text_ids), desc="embed", unit=" texts", mininterval=interval_s, file=sys.stderr) as bar:
        for batch in reports(encoded):
            report.add(batch)
            bar.update(len(batch.text_ids))
    report.texts_embedded += len(text_ids)
    return report.place(work)


def texts_per_batch(num_texts: int, num_workers: int, dim: int) -> int:
    """Texts per spool file: enough batches to keep every worker busy to the end, and files of a few megabytes."""
    share = -(-num_texts // (8 * num_workers))
    return max(32, min(share, MAX_SPOOL_FILE_BYTES // (2 * dim)))


class _EncodeTexts:
    """One encoder in one actor: a batch of texts in, one spool file out."""

    def __init__(self, blocks: list[Block], work_ref: ObjectRef, settings: EncoderSettings, spool: str) -> None:
        import ray

        self.blocks, self.settings, self.spool = blocks, settings, spool
        self.work, self.text_ids = ray.get(work_ref)
        self.encoder: Encoder | None = None

    @reporting
    def __call__(self, batch: dict[str, np.ndarray]) -> Spooled:
        # Loaded here and not on construction: an encoder that cannot be had is reported, an actor that cannot
        # be constructed is tried again and again.
        if self.encoder is None:
            self.encoder = load_encoder(self.settings)
        text_ids = self.text_ids[batch["start"][0] : batch["stop"][0]]
        texts = self.work.texts(self.blocks, text_ids)
        encoded = self.encoder.encode_batch(texts)
        rows = spool_rows([text_hash(text) for text in texts], encoded)
        return Spooled(
            file=write_spool(self.spool, rows),
            text_ids=text_ids,
            truncated_ids=text_ids[encoded.truncated],
            unknown_ids=text_ids[encoded.unknown],
            truncated_example=texts[encoded.truncated[0]] if encoded.truncated else None,
            unknown_example=texts[encoded.unknown[0]] if encoded.unknown else None,
            tokens=encoded.tokens,
            cost_usd=encoded.cost_usd,
        )
