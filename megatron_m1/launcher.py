"""What torchrun tells a process about the processes it started; no torch is needed to ask."""

from __future__ import annotations

import os


def world_size() -> int:
    """The number of processes; 1 where the program was started by hand."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK", "0"))


def is_first_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0
