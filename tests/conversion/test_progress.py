"""What a user sees of a long conversion."""

from __future__ import annotations

import io

import pytest

from megatron_m1.conversion import progress
from megatron_m1.conversion.progress import Bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with Bar("converting", 10 * 10**9, stream) as bar:
        bar.skip(10**9)
        for now[0] in (5.0, 11.0, 12.0, 30.0):
            bar.advance(10**9)
    # What was there before does not count as speed.
    assert stream.getvalue().splitlines() == [
        "converting: 3.0 of 10.0 GB, 182 MB/s, 1 min left",
        "converting: 5.0 of 10.0 GB, 133 MB/s, 1 min left",
    ]


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    with Bar("converting", 4_000_000, stream) as bar:
        bar.advance(2_000_000)
    assert "converting" in stream.getvalue() and "2.0/4.0 MB" in stream.getvalue()
