"""Weights from one format into another: file by file, resumable, by any number of processes.

A process holds the tensors of one parameter at a time, so its memory is bounded by a few of the
largest and not by the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megatron_m1.checkpoint.disk import require_space, told_clearly
from megatron_m1.conversion.journal import Journal, Record
from megatron_m1.conversion.progress import Bar
from megatron_m1.conversion.shards import Shard
from megatron_m1.conversion.weights import Weights
from megatron_m1.conversion.workers import Advance, work


class Target(Protocol):
    """The format that is written."""

    def write(self, folder: Path, shard: Shard, read: Callable[[str], Tensor]) -> Record:
        """Write one file, flushed to the disk.

        Args:
            read: gives a whole parameter by our name.
        """
        ...

    def finish(self, folder: Path, records: Mapping[str, Record]) -> None:
        """Write what makes the files a checkpoint."""
        ...


@dataclass(frozen=True)
class Job:
    """What to convert into what.

    Attributes:
        identity: what the output follows from, as JSON: a broken job goes on only with the same.
    """

    weights: Weights
    target: Target
    shards: tuple[Shard, ...]
    out: Path
    identity: dict[str, Any]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.size for shard in self.shards)


@dataclass(frozen=True)
class _Place:
    """A job, and the folder that it writes to until it is whole."""

    job: Job
    folder: Path


def convert(job: Job, workers: int = 1) -> int:
    """Do the job, or what is left of it; returns the number of files that were there already.

    Raises:
        InputError: the input cannot be read, or the output is another job's.
        StorageError: the disk does not take the output.
    """
    with told_clearly(job.out.parent, job.out.name):
        journal = Journal(job.out, job.identity)
    try:
        left = [shard for shard in job.shards if shard.file not in journal.records]
        needed = sum(shard.size for shard in left)
        require_space(journal.folder, job.out.name, needed)
        with told_clearly(journal.folder, job.out.name, needed):
            with Bar("converting", job.size) as bar:
                bar.skip(job.size - needed)
                place = _Place(job, journal.folder)
                for record in work(_write, place, left, workers, bar.advance):
                    journal.add(record)
            job.target.finish(journal.folder, journal.records)
            journal.publish()
        return len(job.shards) - len(left)
    finally:
        journal.close()


def _write(place: _Place, shard: Shard, advance: Advance) -> Record:
    share = shard.size // max(len(shard.parameters), 1)

    def read(name: str) -> Tensor:
        advance(share)
        return place.job.weights.read(name)

    record = place.job.target.write(place.folder, shard, read)
    advance(shard.size - share * len(shard.parameters))
    return record
