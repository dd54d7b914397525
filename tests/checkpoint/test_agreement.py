"""What only the first process does, and takes long over."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch.distributed as dist

from megatron_m1.checkpoint.agreement import on_first_at_length
from megatron_m1.errors import InputError
from tests.distributed import Pool


def slowly() -> tuple[str, float]:
    """The outcome, and the longest time for which the others heard nothing."""

    def action() -> str:
        time.sleep(0.5)
        return f"of {dist.get_rank()}"

    waits, gather = [], dist.all_gather_object

    def timed(*arguments: object) -> None:
        began = time.perf_counter()
        gather(*arguments)
        waits.append(time.perf_counter() - began)

    dist.all_gather_object = timed
    try:
        return on_first_at_length(action, 0.05), max(waits)
    finally:
        dist.all_gather_object = gather


def failing() -> str:
    def action() -> None:
        raise InputError("not there")

    try:
        on_first_at_length(action, 0.05)
    except InputError as error:
        return str(error)
    return ""


def test_processes_meet_while_the_first_works(ranks: Callable[[int], Pool]) -> None:
    for outcome, longest in ranks(2).run(slowly):
        assert outcome == "of 0" and longest < 0.4


def test_what_fails_fails_everywhere(ranks: Callable[[int], Pool]) -> None:
    assert ranks(2).run(failing) == ["not there"] * 2
