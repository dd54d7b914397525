"""Jobs on a real Slurm of two nodes: what they train, and what they survive."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_m1.cluster.local_slurm import LocalSlurm
from megatron_m1.config import RunConfig
from megatron_m1.config_loading import load
from megatron_m1.data.indexed import IndexedTokens
from megatron_m1.data.reader import Reader
from megatron_m1.errors import EXIT_INPUT
from tests.slurm.conftest import STEPS, Job

pytestmark = pytest.mark.slurm
Queue = Callable[..., Job]


def assert_unbroken(job: Job, reference: list[float]) -> None:
    """Each step once, with the loss of a run that nothing disturbed."""
    assert job.steps() == list(range(1, STEPS + 1))
    assert job.losses() == pytest.approx(reference, rel=1e-4)


def test_two_nodes_train_as_one_process(queue: Queue, reference: list[float]) -> None:
    """By torchrun behind the check of the nodes, and by srun."""
    by_torchrun = queue("cluster.doctor=true", "cluster.doctor_seconds=0.5", "train.eval_every=0")
    by_srun = queue("--launcher", "srun", "train.eval_every=0")
    for job in (by_torchrun, by_srun):
        assert job.finish() == "COMPLETED", job.log
        assert_unbroken(job, reference)
    assert "meeting              2 processes on 2 nodes by gloo" in by_torchrun.log
    assert "all-reduce" not in by_srun.log


def test_a_time_limit_saves_and_queues_again(
    slurm: LocalSlurm, queue: Queue, reference: list[float]
) -> None:
    job = queue("cluster.time_limit=1", "cluster.signal_lead=50", "checkpoint.every=0")
    # On a slow machine the signal, 10 to 25 seconds after the start, comes before the first step.
    job.wait(lambda: len(job.losses()) >= 2 or job.show("Restarts") == "1", "two steps")
    job.each_rank(psutil.Process.suspend)
    job.wait(lambda: job.show("RunTime") > "00:00:30" or job.show("Restarts") == "1", "the signal")
    job.let_go()
    job.wait(lambda: job.show("Restarts") == "1", "the job to be queued again")
    saved = len(job.losses())
    assert 0 < saved < STEPS
    assert f"stopped by SIGUSR1 after step {saved} of {STEPS}" in job.log
    slurm.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")
    assert job.finish() == "COMPLETED", job.log
    assert f"going on from step {saved}" in job.log
    assert_unbroken(job, reference)


def test_preemption_saves_and_queues_again(
    slurm: LocalSlurm, queue: Queue, reference: list[float]
) -> None:
    job = queue("--launcher", "srun", "cluster.exclusive=true", "checkpoint.every=0")
    job.hold_after(3)
    # Preempting goes on where it is held: Slurm sends SIGCONT before SIGTERM.
    slurm.run(
        *("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"),
        *("--wrap", "sleep 1"),
    )
    job.wait(lambda: job.show("Restarts") == "1", "the job to be queued again")
    assert f"stopped by SIGTERM after step {len(job.losses())} of {STEPS}" in job.log
    assert job.finish() == "COMPLETED", job.log
    assert_unbroken(job, reference)


def test_a_lost_node_costs_the_steps_since_the_last_save(
    slurm: LocalSlurm, queue: Queue, reference: list[float]
) -> None:
    job = queue("--launcher", "srun")
    job.hold_after(5)
    slurm.lose_node("n2")
    job.wait(lambda: job.show("Restarts") == "1", "the job to be queued again")
    slurm.start_node("n2")
    slurm.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    assert job.finish() == "COMPLETED", job.log
    assert "going on from step" in job.log
    assert_unbroken(job, reference)


def read_only_by(rank: int, data: str) -> np.ndarray:
    """The tokens of a document that of two ranks this one alone reads in the first step."""
    config = load("pretrain", RunConfig, ["model=tiny"])
    reader = Reader([IndexedTokens(data, 64)], 64, config.seed)
    first, second = (
        {tuple(row.tokens[a:b].tolist()) for row in rows for a, b in documents(row)}
        for rows in (list(reader.micro_batches(0, 4, 1, each, 2)) for each in range(2))
    )
    mine, others = (second, first) if rank else (first, second)
    return np.array(max(mine - others, key=len))


def documents(row) -> list[tuple[int, int]]:
    bounds = row.document_bounds.tolist()
    return list(zip(bounds, bounds[1:], strict=False))


def test_one_failing_rank_ends_the_job_with_its_traceback(
    queue: Queue, data: str, tmp_path: Path
) -> None:
    """A token that the model does not know, in a document that only rank 1 reads."""
    broken = tmp_path / "broken"
    shutil.copy(f"{data}.idx", f"{broken}.idx")
    tokens = np.fromfile(f"{data}.bin", dtype=np.uint16)
    document = read_only_by(1, data)
    (start,) = np.flatnonzero(
        (np.lib.stride_tricks.sliding_window_view(tokens, len(document)) == document).all(axis=1)
    )
    tokens[start] = 65_000
    tokens.tofile(f"{broken}.bin")
    job = queue(train=str(broken))
    assert job.finish() == "FAILED"
    assert job.show("Restarts") == "0"
    summary = job.log.split(f"failed with exit code {EXIT_INPUT}")[1]
    assert "rank 1 on " in summary and "failed first: " in summary
    assert "Traceback (most recent call last)" in summary
    # Rank 0, which only loses its peer, may be ended before it can say so.
    assert "rank 0 on " not in summary.partition("Traceback")[0]


def test_a_chain_goes_on_where_the_one_before_stopped(
    slurm: LocalSlurm, queue: Queue, reference: list[float]
) -> None:
    job = queue("--chain", "3", "--launcher", "srun", "cluster.requeue=false")
    job.hold_after(3)
    with contextlib.suppress(RuntimeError):
        # For a task of an array the signal arrives, but scancel tries again and finds no task.
        slurm.run("scancel", "--signal=USR1", f"{job.number}_1")
    job.let_go()
    job.wait(lambda: not slurm.run("squeue", "--noheader"), "the chain to end")
    logs = sorted(path.name for path in (job.run_dir / "slurm").glob("*.out"))
    assert logs == [f"{job.number}_{link}.out" for link in (1, 2)]
    assert "stopped by SIGUSR1" in job.log and "cluster.requeue=false leaves the rest" in job.log
    assert_unbroken(job, reference)


def test_a_cancelled_job_leaves_nothing_behind(slurm: LocalSlurm, queue: Queue) -> None:
    job = queue()
    job.hold_after(3)
    assert len(slurm.processes(job.number)) >= 5
    slurm.run("scancel", job.number)
    job.wait(lambda: not slurm.run("squeue", "--noheader"), "an empty queue")
    assert job.show("JobState") == "CANCELLED"
    assert slurm.processes(job.number) == []
    assert job.show("Restarts") == "0"
    # It had time to save.
    assert (job.run_dir / "checkpoints/latest").read_text() == f"step_{len(job.losses()):06}"
