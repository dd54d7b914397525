"""How far a long file operation has come: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
from threading import Lock
from time import monotonic
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_SECONDS = 10.0  # between lines


class Bar:
    """Bytes of a total that are done; a context manager."""

    def __init__(self, title: str, total: int, stream: TextIO | None = None) -> None:
        self._title, self._total = title, max(total, 1)
        self._stream = stream or sys.stderr
        self._done = self._before = 0
        self._start = self._last = monotonic()
        self._lock = Lock()
        self._live = _live(self._stream) if self._stream.isatty() else None
        self._task = self._live.add_task(title, total=self._total) if self._live else None

    def skip(self, size: int) -> None:
        """Count bytes that were there before."""
        self._before += size
        self.advance(size)

    def advance(self, size: int) -> None:
        """Count bytes that are done. Any thread may."""
        with self._lock:
            self._advance(size)

    def _advance(self, size: int) -> None:
        self._done += size
        if self._live and self._task is not None:
            self._live.update(self._task, completed=self._done)
        elif monotonic() - self._last > _SECONDS:
            self._last = monotonic()
            self._print()

    def _print(self) -> None:
        speed = (self._done - self._before) / max(monotonic() - self._start, 1e-9)
        left = (self._total - self._done) / speed if speed else 0
        print(
            f"{self._title}: {self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB, "
            f"{speed / 1e6:.0f} MB/s, {left / 60:.0f} min left",
            file=self._stream,
            flush=True,
        )

    def __enter__(self) -> Bar:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()


def _live(stream: TextIO) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(file=stream),
    )
