"""The slowest of the processes is found and named."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import redirect_stderr
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_m1.observe.sinks import Metrics
from megatron_m1.training.callbacks.stragglers import Stragglers
from tests.distributed import Pool


def compared(seconds: list[float], factor: float) -> tuple[list[Metrics], str]:
    """The metrics of four steps, of which every second compares, and this process's words."""
    callback, run = Stragglers(2, factor), SimpleNamespace()
    own: Any = seconds[int(os.environ["RANK"])]
    said, found = io.StringIO(), []
    with redirect_stderr(said):
        for _ in range(4):
            metrics: Metrics = {"time/data": 0.01, "time/forward_backward": own}
            callback.on_step(run, metrics)  # type: ignore[arg-type]
            found.append(metrics)
    return found, said.getvalue()


@pytest.mark.parametrize(
    ("seconds", "slowest", "ratio", "is_named"),
    [
        ([0.1, 0.1, 0.49, 0.1], 2, 0.5 / 0.11, True),
        ([0.1, 0.1, 0.1, 0.13], 3, 0.14 / 0.11, False),
        ([0.2, 0.1], 0, 0.21 / 0.11, True),
    ],
)
def test_the_slowest_is_named_by_itself_and_recorded_by_all(
    seconds: list[float], slowest: int, ratio: float, is_named: bool, ranks: Callable[[int], Pool]
) -> None:
    results = ranks(len(seconds)).run(compared, seconds, 1.5)
    for rank, (steps, said) in enumerate(results):
        for index, metrics in enumerate(steps):
            if index % 2 == 0:
                assert "perf/slowest_rank" not in metrics
                continue
            assert metrics["perf/slowest_rank"] == slowest
            assert metrics["perf/slowest_over_median"] == pytest.approx(ratio)
        lines = said.splitlines()
        assert len(lines) == (2 if is_named and rank == slowest else 0)
        assert all(line.startswith(f"warning: rank {slowest} on ") for line in lines)
    if is_named:
        words = results[slowest][1].splitlines()[0]
        assert words.endswith(
            "in the last 2 steps; in each of them time/data 0.01 s, median 0.01 s, "
            f"time/forward_backward {seconds[slowest]:g} s, median 0.1 s"
        )
