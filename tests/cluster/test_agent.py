"""The launcher of jobs with small programs: exit codes and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_m1.cluster import failures

ROOT = Path(__file__).resolve().parents[2]
# Says that it listens, and leaves with 75 some time after a signal.
SAVES = """
import os, signal, sys, time
stopped = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: stopped.append(1))
open(sys.argv[1] + "/listens." + os.environ["RANK"], "w").close()
while not stopped:
    time.sleep(0.05)
time.sleep(1)
open(sys.argv[1] + "/saved." + os.environ["RANK"], "w").close()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.exit(75)
"""
FAILS = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    {}
time.sleep(60)
"""


def start(folder: Path, program: str) -> subprocess.Popen[str]:
    (folder / "program.py").write_text(program)
    command = [sys.executable, "-m", "megatron_m1.cluster.agent", "--standalone"]
    return subprocess.Popen(
        [*command, "--nproc-per-node=2", str(folder / "program.py"), str(folder)],
        cwd=ROOT,
        env={**os.environ, failures.FOLDER_VARIABLE: str(folder / "attempt")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> int:
    try:
        process.communicate(timeout=100)
    finally:
        process.kill()
    return process.returncode


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_processes_are_told_and_waited_for(number: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path, SAVES)
    limit = time.monotonic() + 60
    while len(list(tmp_path.glob("listens.*"))) < 2 and time.monotonic() < limit:
        time.sleep(0.1)
    process.send_signal(number)
    assert ended(process) == 75
    assert len(list(tmp_path.glob("saved.*"))) == 2


@pytest.mark.parametrize(
    ("end", "code"),
    [("sys.exit(74)", 74), ("os.kill(os.getpid(), signal.SIGKILL)", 137)],
    ids=["exit", "killed"],
)
def test_it_ends_as_the_first_that_failed(end: str, code: int, tmp_path: Path) -> None:
    assert ended(start(tmp_path, FAILS.format(end))) == code
    found = failures.read(tmp_path / "attempt")
    assert [(each.rank, each.error) for each in found] == (
        [(1, "ended by SIGKILL")] if code == 137 else []
    )


def test_all_is_well(tmp_path: Path) -> None:
    assert ended(start(tmp_path, "print('done')")) == 0
