"""How much memory this process takes, on a CPU or a GPU."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


def peak_bytes() -> int:
    """The largest resident set of this process so far, or since `forget_peak`."""
    if sys.platform == "linux":
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> int:
    """Give free memory back to the system, let the peak start anew, and return the bytes that are
    held. On Linux."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def bytes_added(call: Callable[[], object], device: torch.device) -> int:
    """How far one call takes memory beyond what is held before it, at its peak. On Linux or a GPU.

    What libraries take once in their first call is counted in it.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    before = forget_peak()
    call()
    return peak_bytes() - before


@dataclass
class TensorBytes:
    """How far tensors took memory beyond what they held before, at their peak."""

    peak: int = 0


@contextmanager
def tensors_counted() -> Iterator[TensorBytes]:
    """Count what PyTorch's CPU allocator hands this thread, in its kernels too, and takes back. A
    message that a thread of the network frees counts to the end."""
    found = TensorBytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    events = list(profiler.profiler.kineto_results.experimental_event_tree())
    for event in events:  # which grows
        events += event.children
    changes = [event for event in events if event.tag == _EventType.Allocation]
    changes.sort(key=lambda event: event.start_time_ns)
    found.peak = max(accumulate((change.extra_fields.alloc_size for change in changes), initial=0))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
