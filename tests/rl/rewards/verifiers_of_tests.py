"""Verifiers as a user would write them, some of which misbehave as the response says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None
) -> Any:
    word, _, rest = solution_str.partition(" ")
    return globals()[f"on_{word}"](rest, ground_truth, extra_info or {})


def on_score(rest: str, ground_truth: Any, extra_info: dict[str, Any]) -> Any:
    return {"score": float(rest), "process": os.getpid(), "level": extra_info.get("level", 0)}


def on_sleep(rest: str, ground_truth: Any, extra_info: dict[str, Any]) -> float:
    time.sleep(float(rest))
    return 1.0


def on_stuck(rest: str, ground_truth: Any, extra_info: dict[str, Any]) -> float:
    """Deaf to every signal that can be ignored."""
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
    while True:
        time.sleep(1)


def on_start(rest: str, ground_truth: Any, extra_info: dict[str, Any]) -> float:
    """Starts a program that outlives it, and hangs."""
    Path(rest).write_text(str(subprocess.Popen(["sleep", "60"]).pid))
    return on_sleep("60", ground_truth, extra_info)


def on_raise(rest: str, ground_truth: Any, extra_info: dict[str, Any]) -> float:
    raise ValueError(rest)


def on_exit(rest: str, ground_truth: Any, extra_info: dict[str, Any]) -> float:
    sys.exit(int(rest))


def on_die(rest: str, ground_truth: Any, extra_info: dict[str, Any]) -> float:
    os.kill(os.getpid(), int(rest))
    return 1.0


def on_grow(rest: str, ground_truth: Any, extra_info: dict[str, Any]) -> float:
    return float(len(bytearray(int(rest) << 20)) > 0)


def on_text(rest: str, ground_truth: Any, extra_info: dict[str, Any]) -> Any:
    return rest


def on_alarm(rest: str, ground_truth: Any, extra_info: dict[str, Any]) -> float:
    """Graders keep their own time with SIGALRM, which works in a main thread alone."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    time.sleep(0.05)
    return 1.0


def on_print(rest: str, ground_truth: Any, extra_info: dict[str, Any]) -> float:
    print(rest * 100_000)
    return 1.0


def on_torch(rest: str, ground_truth: Any, extra_info: dict[str, Any]) -> float:
    return float("torch" in sys.modules)
