"""How long calls take, on a CPU or a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]


def seconds_of(call: Call, device: torch.device) -> float:
    """Of the clock; on a CPU with one thread of its processor, which other work disturbs less."""
    if device.type != "cuda":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        started = clock()
        call()
        return clock() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def rounds(
    calls: Mapping[str, Call],
    device: torch.device,
    seconds: float,
    refused: tuple[type[Exception], ...] = (torch.OutOfMemoryError,),
) -> dict[str, list[float]]:
    """The seconds of each call, made in turns for about `seconds` each: at least three times, after
    one that warms up. A call that raises an error of `refused` is named and left out."""
    found: dict[str, list[float]] = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = []
        except refused as error:
            print(f"  {name}: {type(error).__name__}")
    spent, turns = 0.0, 0
    while found and (spent < seconds * len(found) or turns < 3):
        turns += 1
        for name, timings in found.items():
            timings.append(seconds_of(calls[name], device))
            spent += timings[-1]
    return found


def best_of(seconds: list[float], device: torch.device) -> float:
    """The fastest on a CPU, whose speed drifts with its other work; the median on a GPU."""
    return min(seconds) if device.type == "cpu" else statistics.median(seconds)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy too large for any cache."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8).to(device)
    target = torch.zeros_like(source)
    (timings,) = rounds({"copy": lambda: target.copy_(source)}, device, 0.5).values()
    return 2 * source.nbytes / best_of(timings, device)
