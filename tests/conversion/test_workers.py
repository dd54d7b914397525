"""Work by several processes, of which one is lost."""

from __future__ import annotations

import os
import signal

import pytest

from megatron_m1.conversion.workers import Advance, work
from megatron_m1.errors import EXIT_WORKER, InputError, WorkerDied


def _work(shared: int, item: int, advance: Advance) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 5:
        raise InputError("five")
    advance(item)
    return shared + item


def test_a_worker_that_is_killed_is_one_sentence() -> None:
    with pytest.raises(WorkerDied, match="one of the 2 worker processes was killed") as died:
        list(work(_work, 10, [1, 2, 3, 4], 2, lambda size: None))
    assert "\n" not in str(died.value)
    assert died.value.exit_code == EXIT_WORKER


def test_an_error_of_a_worker_is_its_own() -> None:
    counted: list[int] = []
    with pytest.raises(InputError, match="five"):
        list(work(_work, 10, [1, 5], 2, counted.append))
    assert sorted(work(_work, 10, [1, 2], 2, counted.append)) == [11, 12]
