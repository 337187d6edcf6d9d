"""Write many facts as one file or as a directory of parts, whichever the output's name says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice

import pyarrow.fs as pafs

from kblam_ray.errors import InputError
from kblam_ray.facts.fact import Fact
from kblam_ray.facts.inputs import format_of
from kblam_ray.facts.writing import write_facts
from kblam_ray.storage import filesystem, join, normalize, storage_errors

PART_FACTS = 100_000
"""Facts in one part, unless a job shards otherwise."""

_PART = re.compile(r"part-(\d{6,})\.parquet")


class FactsOutput:
    """Where a job writes its facts: one file (`.jsonl`, `.parquet`, `.csv`, ...) or a directory of Parquet parts."""

    def __init__(self, uri: str) -> None:
        """Check the target before any work is done for it.

        Raises:
            InputError: a directory that holds something else than parts, or a name with an unknown ending.
        """
        self.uri = normalize(uri)
        name = self.uri.rpartition("/")[2]
        self.is_one_file = format_of(name) is not None
        if not self.is_one_file:
            self._check_directory(name)

    def _check_directory(self, name: str) -> None:
        if re.fullmatch(r".*\.[A-Za-z]\w{1,7}", name):
            raise InputError(
                "an unknown kind of output", where=self.uri, help="name a .jsonl or .parquet file, or a directory"
            )
        foreign = [name for name in self._files() if not _PART.fullmatch(name) and not name.startswith((".", "_"))]
        if foreign:
            raise InputError(
                f"the output directory holds {foreign[0]}", where=self.uri, help="name an empty or a new directory"
            )

    @property
    def work_uri(self) -> str:
        """A hidden folder beside the output: readers of data folders pass over names that begin with a dot."""
        folder, _, name = self.uri.rpartition("/")
        return f"{folder}/.{name}.units"

    def part_uri(self, number: int) -> str:
        return join(self.uri, f"part-{number:06d}.parquet")

    def write(self, facts: Iterable[Fact]) -> int:
        """Write all facts from this process; the number written.

        Raises:
            StorageError: the target cannot be written. A single file is then as it was.
        """
        if self.is_one_file:
            return write_facts(facts, self.uri)
        rest, total, number = iter(facts), 0, 0
        while part := list(islice(rest, PART_FACTS)):
            total += write_facts(part, self.part_uri(number))
            number += 1
        self.finish(number)
        return total

    def finish(self, num_parts: int) -> None:
        """Remove parts that an earlier, longer output left in the directory."""
        with storage_errors(self.uri):
            store, path = filesystem(self.uri)
            for name in self._files():
                part = _PART.fullmatch(name)
                if part and int(part[1]) >= num_parts:
                    store.delete_file(f"{path}/{name}")

    def _files(self) -> Iterator[str]:
        with storage_errors(self.uri):
            store, path = filesystem(self.uri)
            info = store.get_file_info(path)
            if info.type == pafs.FileType.File:
                raise InputError("the output is a file", where=self.uri, help="end its name in .jsonl or .parquet")
            yield from (each.base_name for each in store.get_file_info(pafs.FileSelector(path, allow_not_found=True)))
