"""A function on several new processes of this machine, as ranks of a run."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def on_ranks(
    ranks: int, function: Callable[..., Result], *arguments: Any, threads: int = 1
) -> list[Result]:
    """`function(*arguments)` on each rank, results in rank order.

    Each is a new process with `threads` threads and the environment of torchrun, so that
    `torch.distributed.init_process_group` needs no more than a backend. `function` is one that the
    main module or an imported one defines.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with multiprocessing.get_context("spawn").Pool(ranks) as pool:
        calls = [(rank, ranks, port, threads, function, arguments) for rank in range(ranks)]
        return pool.starmap(_on_rank, calls, chunksize=1)


def _on_rank(
    rank: int,
    ranks: int,
    port: int,
    threads: int,
    function: Callable[..., Result],
    arguments: tuple[Any, ...],
) -> Result:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(threads)
    return function(*arguments)
