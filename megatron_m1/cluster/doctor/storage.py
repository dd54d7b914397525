"""Disk, memory and limits of this node."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from megatron_m1.checkpoint.disk import readable
from megatron_m1.cluster.doctor.finding import OK, PROBLEM, WARNING, Finding

_LEAST_FREE, _LITTLE_FREE = 10**9, 50 * 10**9
_WRITTEN = 64 * 2**20
_LEAST_FILES, _LEAST_SHARED = 4096, 2**30


def examine(folder: Path, has_gpu: bool) -> Iterator[Finding]:
    """Where checkpoints go, and what the system allows a process."""
    yield from _disk(folder)
    memory = psutil.virtual_memory()
    yield Finding("memory", OK, f"{readable(memory.total)}, {os.cpu_count()} cores")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < _LEAST_FILES:
        found = f"a process may open {files} files"
        yield Finding("limits", WARNING, found, "ulimit -n 65536 in cluster.setup")
    if has_gpu and os.path.isdir("/dev/shm"):
        shared = os.statvfs("/dev/shm")
        if shared.f_bavail * shared.f_frsize < _LEAST_SHARED:
            found = f"{readable(shared.f_bavail * shared.f_frsize)} free in the shared memory"
            yield Finding("limits", WARNING, found, "NCCL wants some: --shm-size in containers")


def _disk(folder: Path) -> Iterator[Finding]:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    try:
        seconds = _seconds_to_write(place)
    except OSError as error:
        advice = "give --folder, or mend it"
        yield Finding("disk", PROBLEM, f"{place} cannot be written: {error.strerror}", advice)
        return
    system = os.statvfs(place)
    free, speed = system.f_bavail * system.f_frsize, _WRITTEN / seconds
    found = f"{place}: {readable(free)} free, {readable(int(speed))}/s written and flushed"
    advice = "checkpoint.keep=N removes old ones; dry_run=true says how large a run is"
    if free < _LEAST_FREE:
        yield Finding("disk", PROBLEM, found, advice)
    elif free < _LITTLE_FREE:
        yield Finding("disk", WARNING, found, advice)
    else:
        yield Finding("disk", OK, found)
    if system.f_files and system.f_favail < 10_000:
        yield Finding("disk", WARNING, f"{place}: {system.f_favail} files left", advice)


def _seconds_to_write(folder: Path) -> float:
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor.") as file:
        started = time.perf_counter()
        for _ in range(_WRITTEN // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return max(time.perf_counter() - started, 1e-6)
