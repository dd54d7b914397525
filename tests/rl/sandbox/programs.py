"""Running Python text in a sandbox, and finding what it left behind."""

from __future__ import annotations

import textwrap
import time
from pathlib import Path
from typing import Any

from megatron_m1.rl.sandbox.config import Limits
from megatron_m1.rl.sandbox.outcome import Outcome
from megatron_m1.rl.sandbox.sandbox import Sandbox


def run(sandbox: Sandbox, program: str, stdin: bytes = b"", **limits: Any) -> Outcome:
    """Run a program within small limits, of which some are given."""
    given = {"seconds": 20.0, "memory_mb": 256, "processes": 8, "output_kb": 64, "files_mb": 8}
    return sandbox.run(
        [sandbox.python, "-I", "-B", "input/program.py"],
        Limits(**{**given, **limits}),
        files={"program.py": textwrap.dedent(program).encode()},
        stdin=stdin,
    )


def run_argument(sandbox: Sandbox, program: str, **limits: Any) -> Outcome:
    """Run a program that stands in the arguments, where ``remain`` finds it."""
    return sandbox.run([sandbox.python, "-I", "-c", program], Limits(**limits))


def remain(mark: str) -> bool:
    """Whether processes with a mark in their arguments are there, after some time to go."""
    end = time.monotonic() + 10
    while found := bool(users_of(mark)):
        if time.monotonic() > end:
            break
        time.sleep(0.02)
    return found


def users_of(mark: str) -> set[int]:
    """The users, as the machine knows them, of processes with a mark in their arguments."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "cmdline").read_bytes():
                # It starts as root to become nobody.
                if (folder / "comm").read_text().strip() == "setpriv":
                    continue
                status = (folder / "status").read_text()
                found.add(int(status.split("Uid:")[1].split()[0]))
        except OSError:
            continue
    return found
