"""How much memory this process takes, on a CPU or a GPU."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch


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


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
