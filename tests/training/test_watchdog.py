"""Hangs: who is named, what is left, and that nothing else is taken for one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_m1.errors import EXIT_HANG
from megatron_m1.training import watchdog
from megatron_m1.training.sections import BETWEEN, Sections
from megatron_m1.training.watchdog import Sign, summary, watched
from parallel.layout import Layout
from tests.distributed import _free_port
from tests.training.small_run import write_data

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("run/hang")


def sign(rank: int, section: str = "reduce", beats: int = 9, is_waiting: bool = True) -> Sign:
    return Sign(rank, f"node{rank}", section, beats, 8.0, is_waiting)


CASES: dict[str, tuple[list[Sign], int, str]] = {
    "fewer sections": (
        [sign(0), sign(1, "data", 7), sign(2)],
        3,
        "rank 1 on node1 lags, in data; all others are in reduce",
    ),
    "busy while others wait": (
        [sign(0), sign(1, is_waiting=False)],
        2,
        "rank 1 on node1 lags, in reduce; all others are in reduce",
    ),
    "no answer": (
        [sign(0), sign(2)],
        4,
        "rank 1, 3 does not answer, stopped or gone with its host; all others are in reduce",
    ),
    "all alike": ([sign(0), sign(1)], 2, "no rank lags; all others are in reduce"),
    "alone": (
        [sign(0, "forward_backward", is_waiting=False)],
        1,
        "rank 0 on node0 lags, in forward_backward",
    ),
    "many": (
        [sign(rank, beats=9 - (rank < 10)) for rank in range(20)],
        20,
        f"rank 0, 1, 2, 3, 4, 5, 6, 7 and 2 more on {', '.join(f'node{n}' for n in range(10))} "
        "lags, in reduce; all others are in reduce",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_names_who_is_behind(case: str) -> None:
    signs, world, who = CASES[case]
    expected = f"no progress for 8 s: {who}; stacks are in run/hang"
    assert summary(signs, world, 8.0, FOLDER) == expected


def test_sections_nest_and_count_their_own_seconds() -> None:
    sections = Sections()
    with sections.within("forward_backward"):
        time.sleep(0.02)
        with sections.within("reduce"):
            assert sections.current == "reduce"
            time.sleep(0.05)
    assert (sections.current, sections.beats) == (BETWEEN, 4)
    taken = sections.take()
    assert 0.02 <= taken["forward_backward"] < 0.05 <= taken["reduce"]
    assert sections.take() == {}


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[Sections]:
    """The sections whose watchdog would have ended the process."""
    found: list[Sections] = []
    monkeypatch.setattr(watchdog, "_end", lambda sections, limit, folder: found.append(sections))
    return found


def watch(folder: Path, seconds: float) -> Any:
    run: Any = SimpleNamespace(dir=folder, sections=Sections())
    return run, watched(run, seconds)


def test_beats_keep_it_quiet_and_their_end_does_not(
    single_process: Layout, tmp_path: Path, ended: list[Sections]
) -> None:
    run, watching = watch(tmp_path, 0.5)
    with watching:
        for _ in range(10):
            time.sleep(0.1)
            run.sections.beat()
        assert not ended
        time.sleep(0.8)
        assert ended
    time.sleep(0.2)
    after = len(ended)
    time.sleep(0.3)
    assert len(ended) == after, "it watches on after the block"


def test_without_seconds_nothing_is_watched(
    single_process: Layout, tmp_path: Path, ended: list[Sections]
) -> None:
    _, watching = watch(tmp_path, 0.0)
    with watching:
        time.sleep(0.3)
    assert not ended


def test_what_an_earlier_hang_left_is_kept(single_process: Layout, tmp_path: Path) -> None:
    for attempt in range(2):
        (tmp_path / "hang").mkdir()
        (tmp_path / "hang/rank_0.txt").write_text(str(attempt))
        with watch(tmp_path, 60.0)[1]:
            assert not (tmp_path / "hang").exists()
    assert (tmp_path / "hang.1/rank_0.txt").read_text() == "0"
    assert (tmp_path / "hang.2/rank_0.txt").read_text() == "1"


PAUSED = """
import os, signal, subprocess, sys, time
from parallel import host
host.enable()
from types import SimpleNamespace
from pathlib import Path
from megatron_m1.runtime import processes
from megatron_m1.training.sections import Sections
from megatron_m1.training.watchdog import watched
from parallel.layout import Layout
with processes(Layout()):
    run = SimpleNamespace(dir=Path(sys.argv[1]), sections=Sections())
    with watched(run, 2.0):
        wake = f"sleep 4; kill -CONT {os.getpid()}"
        subprocess.Popen(["sh", "-c", wake])
        os.kill(os.getpid(), signal.SIGSTOP)
        for _ in range(10):
            time.sleep(0.1)
        run.sections.beat()
print("alive")
"""


def test_a_process_that_was_paused_as_a_whole_goes_on(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PAUSED, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def hanging(tmp_path: Path, fault: str) -> list[subprocess.Popen[str]]:
    """A run of two processes, as a launcher starts them."""
    prefix = write_data(tmp_path)
    program = [
        *(sys.executable, "-m", "megatron_m1.pretrain", "model=tiny", "data=indexed"),
        *("model.num_layers=2", "model.layer_pattern=LS", "model.vocab_size=64"),
        *(f"data.train=[{prefix}]", "logger=quiet", "train.seq_length=64", "train.report=false"),
        *("train.steps=500", f"run_dir={tmp_path}/run", f"fault=[{fault}]"),
        "train.watchdog_seconds=4",
    ]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    return [
        subprocess.Popen(
            program,
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def test_a_collective_that_never_ends_ends_the_run_and_names_the_rank(tmp_path: Path) -> None:
    ranks = hanging(tmp_path, "hang@3:1")
    try:
        errors = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [EXIT_HANG] * 2, errors
    (line,) = [line for line in errors[0].splitlines() if line.startswith("error: ")]
    assert "no progress for 4 s: rank 1 on " in line
    assert line.endswith(
        f" lags, in forward_backward; all others are in reduce; stacks are in {tmp_path}/run/hang"
    )
    left = [(tmp_path / f"run/hang/rank_{rank}.txt").read_text() for rank in range(2)]
    assert [json.loads(text.splitlines()[0])["rank"] for text in left] == [0, 1]
    assert "finalize_model_grads" in left[0]
    assert "time.sleep" in left[1]


def test_a_process_that_is_stopped_does_not_answer(tmp_path: Path) -> None:
    ranks = hanging(tmp_path, "sigstop@3:1")
    try:
        error = ranks[0].communicate(timeout=120)[1]
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert ranks[0].returncode == EXIT_HANG, error
    assert "no progress for 4 s: rank 1 does not answer, stopped or gone with its host" in error
