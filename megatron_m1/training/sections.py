"""What this process is doing, and how long it does what."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

BETWEEN = "between_steps"


class Sections:
    """The sections of a step, which nest: ``with sections.within("data"): ...``

    Seconds are a section's own, without those inside it, and the host's: what is queued on a device
    counts where the host waits for it.

    Attributes:
        beats: how often a section began or ended. Processes that are equally far have the same.
        since: when that was last, by ``time.monotonic``.
    """

    def __init__(self) -> None:
        self.beats = 0
        self.since = time.monotonic()
        self._seconds: dict[str, float] = defaultdict(float)
        self._names = [BETWEEN]

    @property
    def current(self) -> str:
        return self._names[-1]

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        self.beat()
        self._names.append(name)
        try:
            yield
        finally:
            self.beat()
            self._names.pop()

    def beat(self) -> None:
        """Show that this process is alive; for loops that wait for long."""
        now = time.monotonic()
        self._seconds[self.current] += now - self.since
        self.since = now
        self.beats += 1

    def take(self) -> dict[str, float]:
        """The seconds of each section since this was last asked."""
        taken, self._seconds = self._seconds, defaultdict(float)
        return taken
