"""Outcomes that all processes share: what fails on one raises on every one, at once, instead of
leaving the others in a collective until it times out. Every function is collective."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_m1.errors import ConfigError, UserError
from parallel import host

T = TypeVar("T")


def everywhere(action: Callable[[], T]) -> T:
    """Do it on every process, and go on only if all of them could.

    Raises:
        Exception: this process's error; or, where it has none, that of the first which has. What a
            user can mend is the same error on every process.
    """
    try:
        result, error = action(), None
    except Exception as problem:
        error = problem
    failures = _all_gather(None if error is None else (type(error), str(error)))
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise _same_error(rank, *failure, error) from error
    return result


def on_first(action: Callable[[], T]) -> T:
    """Do it on the first process; every process gets its result, or raises its error."""
    box = [everywhere(action) if dist.get_rank() == 0 else everywhere(lambda: None)]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def on_first_at_length(action: Callable[[], T], seconds: float) -> T:
    """``on_first`` for what may take longer than a collective may: every so many seconds the
    processes meet. The action runs in a thread of its own, which must not communicate."""
    future: Future[T] = Future()
    if dist.get_rank() == 0:
        in_background = threading.Thread(target=_settle, args=(future, action), daemon=True)
        in_background.start()
    while not on_first(lambda: bool(wait([future], seconds).done)):
        pass
    return on_first(future.result)


def _settle(future: Future[T], action: Callable[[], T]) -> None:
    try:
        future.set_result(action())
    except BaseException as error:
        future.set_exception(error)


def gather(value: T) -> list[T] | None:
    """The values of all processes, in the order of their ranks, on the first; None elsewhere."""
    found = [value] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, found, dst=0)
    return found


def total(number: int) -> int:
    """The sum over all processes."""
    return sum(_all_gather(number))


def all_true(flag: bool) -> bool:
    """Whether it holds on every process."""
    holds = torch.tensor(int(flag), device=host.device())
    dist.all_reduce(holds, dist.ReduceOp.MIN)
    return bool(holds)


def _all_gather(value: T) -> list[T]:
    found = [value] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _same_error(rank: int, kind: type, text: str, own: Exception | None) -> Exception:
    if own is not None and not isinstance(own, UserError):
        return own
    if issubclass(kind, ConfigError):
        return ConfigError(text.splitlines())
    return (
        kind(text)
        if issubclass(kind, UserError)
        else RuntimeError(f"process {rank}: {kind.__name__}: {text}")
    )
