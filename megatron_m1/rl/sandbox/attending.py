"""A program under way: fed, read, and stopped at the first limit that it reaches."""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_m1.rl.sandbox.config import Limits

_LOOK_SECONDS = 0.05  # between looks at memory and processes
_GRACE_SECONDS = 5.0  # for what was stopped to be gone, and for its last output
_CHUNK = 1 << 16
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Attended:
    """What came of a program.

    Attributes:
        stopped: the limit at which it was stopped.
    """

    stopped: str | None
    stdout: bytes
    stderr: bytes
    seconds: float


class Attendant:
    """Looks after one program until it has ended.

    Args:
        process: the sandbox's own process, whose descendants the program's are.
        own: how many of the descendants are the sandbox's.
        stop: ends the program and all that it started.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        stdin: bytes,
        limits: Limits,
        own: int,
        stop: Callable[[], None],
    ) -> None:
        self._process, self._limits, self._own, self._stop = process, limits, own, stop
        self._unsent = memoryview(stdin)
        self._printed = {"stdout": bytearray(), "stderr": bytearray()}
        self._selector = selectors.DefaultSelector()
        self._stopped: str | None = None

    def attend(self) -> Attended:
        started = looked = time.monotonic()
        end = started + self._limits.seconds
        with self._selector, self._process:
            self._register()
            while self._process.poll() is None:
                now = time.monotonic()
                if now >= end and self._stopped is not None:
                    self._process.kill()
                elif reached := self._reached(now >= end, now - looked > _LOOK_SECONDS):
                    self._stopped = reached
                    self._stop()
                    end = now + _GRACE_SECONDS
                looked = now if now - looked > _LOOK_SECONDS else looked
                self._move_data()
            seconds = time.monotonic() - started
            self._stop()  # what outlived the program
            self._read_the_rest()
        return Attended(
            self._stopped, bytes(self._printed["stdout"]), bytes(self._printed["stderr"]), seconds
        )

    def _register(self) -> None:
        for name in ("stdin", "stdout", "stderr"):
            stream = getattr(self._process, name)
            os.set_blocking(stream.fileno(), False)
            event = selectors.EVENT_WRITE if name == "stdin" else selectors.EVENT_READ
            self._selector.register(stream, event, name)

    def _reached(self, time_is_up: bool, look: bool) -> str | None:
        """The limit that the program has just reached."""
        if self._stopped is not None:
            return None
        if time_is_up:
            return "seconds"
        if self._has_printed_too_much:
            return "output"
        if not look:
            return None
        members = list(descendants(self._process.pid))
        if len(members) - self._own > self._limits.processes:
            return "processes"
        if sum(map(resident_bytes, members)) > self._limits.memory_mb << 20:
            return "memory"
        return None

    def _move_data(self) -> None:
        """Wait a moment for the streams, or for the end of a process that has closed them."""
        if not self._selector.get_map():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_LOOK_SECONDS)
            return
        for key, _ in self._selector.select(_LOOK_SECONDS):
            stream: IO[bytes] = key.fileobj  # type: ignore[assignment]
            if key.data == "stdin":
                self._feed(stream)
            else:
                self._read(stream, self._printed[key.data])

    def _feed(self, stream: IO[bytes]) -> None:
        try:
            self._unsent = self._unsent[os.write(stream.fileno(), self._unsent[:_CHUNK]) :]
        except BrokenPipeError:
            self._unsent = self._unsent[:0]
        if not self._unsent:
            self._close(stream)

    def _read(self, stream: IO[bytes], printed: bytearray) -> None:
        data = os.read(stream.fileno(), _CHUNK)
        printed += data[: max(self._room, 0)]
        if not data:
            self._close(stream)

    def _read_the_rest(self) -> None:
        end = time.monotonic() + _GRACE_SECONDS
        while self._is_reading() and time.monotonic() < end:
            self._move_data()
        if self._stopped is None and self._has_printed_too_much:
            self._stopped = "output"

    @property
    def _room(self) -> int:
        """Bytes that are kept of what is yet to be printed: one more than are allowed."""
        return self._limits.output_kb * 1024 + 1 - sum(map(len, self._printed.values()))

    @property
    def _has_printed_too_much(self) -> bool:
        return self._room <= 0

    def _is_reading(self) -> bool:
        return any(key.data != "stdin" for key in self._selector.get_map().values())

    def _close(self, stream: IO[bytes]) -> None:
        self._selector.unregister(stream)
        stream.close()


def descendants(process: int) -> Iterator[int]:
    """Processes that a process or its descendants started, where they still are."""
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in map(int, children):
            yield child
            yield from descendants(child)


def resident_bytes(process: int) -> int:
    """Memory that a process has; 0 where it has ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * _PAGE
    except OSError:
        return 0
