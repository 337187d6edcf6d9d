"""Remote encoders: OpenAI, Azure OpenAI and compatible servers, many requests at once, each text once.

Texts go out in requests that no server finds too large. A request that fails in passing is tried again, with
exponential back-off and jitter or after the wait that the server asked for, and only with what has not been
answered. A text beyond the model's limit is found by halving its request, and cut until it fits.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import numpy as np

from kblam_ray.encoders.base import EncodedBatch, Encoder
from kblam_ray.encoders.remote_client import Answer, EmbeddingClient, Retry, TooLong
from kblam_ray.encoders.remote_models import RemoteModel
from kblam_ray.encoders.settings import EncoderSettings
from kblam_ray.errors import EncoderError

logger = logging.getLogger(__name__)

# The servers take 300,000 tokens in a request. A token is at least one byte of UTF-8, so that this bound needs
# no tokenizer, whose vocabulary would have to be downloaded.
REQUEST_BYTES = 300_000
FIRST_WAIT_S = 0.5
LONGEST_BACKOFF_S = 30.0
# How a text is cut where the server does not tell by how much it is too long, and the margin where it does:
# tokens are not spread evenly over a text.
CUT_BLINDLY, CUT_MARGIN = 0.75, 0.95


class RemoteEncoder(Encoder):
    """A model behind OpenAI's embeddings protocol.

    Credentials and endpoints come from the environment that the `openai` package reads. Empty texts are never
    sent; their embedding is zero.
    """

    def __init__(self, model: RemoteModel, settings: EncoderSettings) -> None:
        self.spec = model.spec
        self._model, self._settings = model, settings
        self._client = EmbeddingClient(model, settings)
        if model.usd_per_million_tokens is None:
            logger.warning("the price of %s is not known: its cost is reported as 0", self.spec.name)

    def encode_batch(self, texts: Sequence[str]) -> EncodedBatch:
        """Embed texts; tokens and cost are those of the answers received.

        Raises:
            EncoderAuthenticationError, EncoderQuotaError, EncoderNotFoundError: the server refuses.
            EncoderError: it still failed after `max_retries`, or asks for a longer wait than `max_wait_s`.
        """
        call = _Call(texts, self._client, self._settings, self.spec.dim)
        call.run()
        cost_usd = call.tokens * (self._model.usd_per_million_tokens or 0.0) / 1e6
        return EncodedBatch(call.embeddings_BP, sorted(call.truncated), tokens=call.tokens, cost_usd=cost_usd)


class _StoppedError(Exception):
    """This request was given up because another one failed."""


class _Call:
    """The state of one `encode_batch`, shared by its threads."""

    def __init__(self, texts: Sequence[str], client: EmbeddingClient, settings: EncoderSettings, dim: int) -> None:
        self._texts = list(texts)
        self._client, self._settings = client, settings
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._not_before = 0.0
        self.embeddings_BP = np.zeros((len(texts), dim), dtype=np.float32)
        self.truncated: set[int] = set()
        self.tokens = 0

    def run(self) -> None:
        requests = list(self._requests())
        with ThreadPoolExecutor(max_workers=self._settings.concurrency) as pool:
            futures = [pool.submit(self._finish, rows) for rows in requests]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                # After a failure (or Ctrl-C) nothing more may be sent, or paid for.
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
            errors = [future.exception() for future in futures if not future.cancelled()]
            for error in errors:
                if error is not None and not isinstance(error, _StoppedError):
                    raise error

    def _requests(self) -> Iterator[list[int]]:
        rows: list[int] = []
        size = 0
        for row, text in enumerate(self._texts):
            if not text.strip():
                continue
            length = len(text.encode("utf-8"))
            if rows and (len(rows) == self._settings.request_texts or size + length > REQUEST_BYTES):
                yield rows
                rows, size = [], 0
            rows.append(row)
            size += length
        if rows:
            yield rows

    def _finish(self, rows: list[int]) -> None:
        """Get the embeddings of `rows`, in as many requests as it takes."""
        waiting, failures = [rows], 0
        while waiting:
            rows = waiting.pop()
            try:
                answer = self._send(rows)
            except TooLong as error:
                waiting.extend(self._smaller(rows, error.keep))
                continue
            except Retry as error:
                failures += 1
                self._back_off(failures, error)
                waiting.append(rows)
                continue
            failures = 0
            missing = self._store(rows, answer)
            if missing:
                waiting.append(missing)

    def _send(self, rows: list[int]) -> Answer:
        # A rate limit holds for the whole account: what one thread was told, all heed.
        while (delay := self._not_before - time.monotonic()) > 0 and not self._stop.is_set():
            self._stop.wait(delay)
        if self._stop.is_set():
            raise _StoppedError
        return self._client.embed([self._texts[row] for row in rows])

    def _store(self, rows: list[int], answer: Answer) -> list[int]:
        """Keep what came; the rows that did not."""
        for position, vector_P in answer.embeddings.items():
            self.embeddings_BP[rows[position]] = vector_P
        with self._lock:
            self.tokens += answer.tokens
        return [row for position, row in enumerate(rows) if position not in answer.embeddings]

    def _smaller(self, rows: list[int], keep: float | None) -> list[list[int]]:
        if len(rows) > 1:
            middle = len(rows) // 2
            return [rows[middle:], rows[:middle]]
        row = rows[0]
        text = self._texts[row]
        length = int(len(text) * (CUT_BLINDLY if keep is None else keep * CUT_MARGIN))
        shorter = text[:length].rstrip()
        if not shorter:
            raise EncoderError(
                "the server finds a single character too long",
                where=self._where(),
                help="check the server and the model",
            )
        self._texts[row] = shorter
        with self._lock:
            self.truncated.add(row)
        return [rows]

    def _back_off(self, failures: int, error: Retry) -> None:
        if failures > self._settings.max_retries:
            raise EncoderError(
                f"the server still fails after {failures} attempts: {error}",
                where=self._where(),
                help="check the server, raise --max-retries, then run again",
            ) from error
        backoff_s = min(FIRST_WAIT_S * 2 ** (failures - 1), LONGEST_BACKOFF_S) * random.uniform(0.5, 1.0)
        wait_s = backoff_s if error.wait_s is None else error.wait_s
        if wait_s > self._settings.max_wait_s:
            raise EncoderError(
                f"the server asks for a wait of {wait_s:.0f} s: {error}",
                where=self._where(),
                help="run again later, or raise --max-wait-s",
            ) from error
        logger.info("%s: attempt %d failed (%s), next in %.1f s", self._where(), failures, error, wait_s)
        if error.wait_s is None:
            self._stop.wait(wait_s)
            return
        with self._lock:
            # Spread over a little time, so that the threads do not come back all at once.
            self._not_before = max(self._not_before, time.monotonic() + wait_s)
        self._stop.wait(wait_s + random.uniform(0.0, 0.1) * min(wait_s, 1.0))

    def _where(self) -> str:
        return self._settings.name
