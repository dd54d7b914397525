"""Ends a run that hangs, and says which process is behind and where.

A thread of each process looks at the process's own sections. When none began or ended for
``train.watchdog_seconds``, it leaves the stacks of all threads in RUN_DIR/hang/rank_N.txt, looks
at what the others left there, and ends the process. No collective is part of it, for one may be
what hangs.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_m1.checkpoint import agreement
from megatron_m1.cluster import failures
from megatron_m1.errors import EXIT_HANG
from megatron_m1.files import whole
from megatron_m1.training.sections import Sections
from megatron_m1.training.state import Training

FOLDER = "hang"
_LONGEST_GRACE = 60.0
_LAST_WORDS = 2.0


@dataclass(frozen=True)
class Sign:
    """What a process was doing when it saw that nothing moved.

    Attributes:
        beats: sections that began or ended.
        seconds: since the last one.
        is_waiting: whether one of its threads is in a collective.
    """

    rank: int
    host: str
    section: str
    beats: int
    seconds: float
    is_waiting: bool


@contextmanager
def watched(run: Training, seconds: float) -> Iterator[None]:
    """Watch this process until the block ends. Collective.

    Args:
        seconds: without progress after which the process ends; 0 does not watch.
    """
    if not seconds:
        yield
        return
    folder = run.dir / FOLDER
    agreement.on_first(lambda: _set_aside(folder))
    over = threading.Event()
    arguments = (run.sections, seconds, folder, over)
    threading.Thread(target=_watch, args=arguments, name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _set_aside(folder: Path) -> None:
    """Keep what an earlier hang left."""
    if folder.exists():
        taken = len(list(folder.parent.glob(f"{folder.name}.*")))
        folder.rename(folder.with_name(f"{folder.name}.{taken + 1}"))


def _watch(sections: Sections, limit: float, folder: Path, over: threading.Event) -> None:
    pause = min(1.0, limit / 10)
    awake = looked = time.monotonic()
    while not over.wait(pause):
        now = time.monotonic()
        if now - looked > limit / 2:
            # The whole process was stopped and has been let go on: nothing hangs.
            awake = now
        looked = now
        if now - max(sections.since, awake) > limit:
            _end(sections, limit, folder)


def _end(sections: Sections, limit: float, folder: Path) -> None:
    """Leave a sign, gather those of the others for a while, and end the process."""
    rank, world = dist.get_rank(), dist.get_world_size()
    stacks = _stacks()
    sign = Sign(
        rank,
        socket.gethostname(),
        sections.current,
        sections.beats,
        round(time.monotonic() - sections.since, 1),
        "torch/distributed/" in stacks,
    )
    try:
        _leave(sign, stacks, folder)
        signs = _gather(folder, world, grace=min(limit / 2, _LONGEST_GRACE))
        told = summary(signs, world, limit, folder)
    except OSError as error:
        signs = [sign]
        told = f"no progress for {limit:g} s: rank {rank} is in {sign.section}; {error}"
    failures.keep(rank, told, stacks)
    if rank == min(sign.rank for sign in signs):
        print(f"error: {told}", file=sys.stderr, flush=True)
    else:
        # A launcher ends all processes when the first one ends.
        time.sleep(_LAST_WORDS)
    os._exit(EXIT_HANG)


def _stacks() -> str:
    """The stacks of all threads but this one."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    ]
    return "\n".join(parts)


def _leave(sign: Sign, stacks: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with whole(_path(folder, sign.rank)) as partial:
        partial.write_text(f"{json.dumps(asdict(sign))}\n\n{stacks}")


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.txt"


def _gather(folder: Path, world: int, grace: float) -> list[Sign]:
    """The signs of all processes, or of those that left one within ``grace`` seconds."""
    end = time.monotonic() + grace
    while True:
        there = [path for path in (_path(folder, rank) for rank in range(world)) if path.exists()]
        if len(there) == world or time.monotonic() > end:
            return [Sign(**json.loads(path.open().readline())) for path in there]
        time.sleep(0.1)


def summary(signs: list[Sign], world: int, limit: float, folder: Path) -> str:
    """One sentence that names who is behind, and where all are."""
    silent = sorted({*range(world)} - {sign.rank for sign in signs})
    behind = [] if silent else laggards(signs)
    if silent:
        who = f"rank {_listed(silent)} does not answer, stopped or gone with its host"
    elif behind:
        hosts = ", ".join(sorted({sign.host for sign in behind}))
        ranks = _listed([sign.rank for sign in behind])
        who = f"rank {ranks} on {hosts} lags, in {_sections(behind)}"
    else:
        who = "no rank lags"
    others = [sign for sign in signs if sign not in behind]
    where = f"; all others are in {_sections(others)}" if others else ""
    return f"no progress for {limit:g} s: {who}{where}; stacks are in {folder}"


def laggards(signs: list[Sign]) -> list[Sign]:
    """Who is behind: those that went through the fewest sections; where all are equally far, those
    that are not in a collective while others are. None where all are alike."""
    least = min(sign.beats for sign in signs)
    behind = [sign for sign in signs if sign.beats == least]
    if len(behind) == len(signs):
        behind = [sign for sign in signs if not sign.is_waiting]
    return behind if len(behind) < len(signs) or len(signs) == 1 else []


def _sections(signs: list[Sign]) -> str:
    return ", ".join(sorted({sign.section for sign in signs}))


def _listed(ranks: list[int], most: int = 8) -> str:
    shown = ", ".join(map(str, ranks[:most]))
    return f"{shown} and {len(ranks) - most} more" if len(ranks) > most else shown
