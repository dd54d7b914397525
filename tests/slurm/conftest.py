"""A real Slurm of two nodes for the tests of this folder, and jobs on it."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from megatron_m1.cluster.local_slurm import LocalSlurm, local_slurm, missing_packages
from megatron_m1.config import RunConfig
from megatron_m1.config_loading import load
from megatron_m1.pretrain import pretrain
from parallel.layout import Layout
from tests.training.small_run import write_data
from tools import submit

STEPS = 20
# Evaluations make the steps of a job slow enough to be disturbed.
_SLOW = ("train.eval_every=1", "train.eval_rows=24")
_SMALL = (
    *("model=tiny", "model.num_layers=4", "model.layer_pattern=LLLS", "model.hidden_size=32"),
    *("model.head_dim=16", "model.rotary_dim=8", "model.ffn_hidden_size=32"),
    *("model.num_experts=4", "model.vocab_size=64", "data=indexed", "logger=quiet"),
    *("train.report=false", "train.global_batch=4", "train.micro_batch=1", "train.seq_length=64"),
    *("optim.shape=constant", "optim.lr=1e-2", f"train.steps={STEPS}"),
)


@dataclass
class Job:
    """A job in the queue, with the run that it trains."""

    slurm: LocalSlurm
    number: str
    run_dir: Path

    def show(self, field: str) -> str:
        """A field of ``scontrol show job``: JobState, Restarts, ..."""
        shown = self.slurm.run("scontrol", "show", "job", self.number)
        found = re.search(rf"\b{field}=(\S+)", shown)
        return found[1] if found else ""

    @property
    def log(self) -> str:
        logs = sorted((self.run_dir / "slurm").glob("*.out"))
        return "\n".join(path.read_text() for path in logs)

    def losses(self) -> list[float]:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("}")]
        return [record["train/loss"] for record in records if "train/loss" in record]

    def steps(self) -> list[int]:
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        return [each["step"] for each in map(json.loads, lines) if "train/loss" in each]

    def hold_after(self, steps: int) -> None:
        """Stop the processes of the run in the middle of it, however fast the machine is."""
        self.wait(lambda: len(self.losses()) >= steps, f"{steps} steps")
        self.each_rank(psutil.Process.suspend)
        assert len(self.losses()) < STEPS

    def let_go(self) -> None:
        self.each_rank(psutil.Process.resume)

    def each_rank(self, action: Callable[[psutil.Process], None]) -> None:
        for process in self.slurm.processes(self.number):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "WORLD_SIZE" in process.environ():
                    action(process)

    def wait(self, condition: Callable[[], bool], what: str, limit: float = 150) -> None:
        try:
            self.slurm.wait(condition, what, limit)
        except RuntimeError as error:
            raise AssertionError(f"{error}; the log of the job:\n{self.log}") from None

    def finish(self) -> str:
        """Wait for the end, and say how it ended. The hold after a requeue is shortened."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        def is_over() -> bool:
            self.slurm.shorten_hold(self.number)
            return self.show("JobState") in ended

        self.wait(is_over, f"the end of job {self.number}")
        return self.show("JobState")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSlurm]:
    """Slurm, with the environment of this process set for its commands."""
    if missing := missing_packages():
        pytest.skip(missing)
    with (
        local_slurm(tmp_path_factory.mktemp("slurm")) as cluster,
        pytest.MonkeyPatch.context() as m,
    ):
        for name in ("SLURM_CONF", "PATH"):
            m.setenv(name, cluster.environment[name])
        yield cluster


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="package")
def reference(
    data: str, single_process: Layout, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """The losses of one process that nothing disturbs."""
    folder = tmp_path_factory.mktemp("reference")
    config = load("pretrain", RunConfig, [*_SMALL, f"data.train=[{data}]"])
    pretrain(replace(config, run_dir=str(folder)))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [record["train/loss"] for record in records if "train/loss" in record]


@pytest.fixture
def queue(slurm: LocalSlurm, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """``queue(*words)`` submits the small run on two nodes by ``tools/submit.py``."""
    jobs = []

    def submitted(*words: str, train: str = data) -> Job:
        run_dir = tmp_path / f"run{len(jobs)}"
        keys = [*_SMALL, *_SLOW, f"data.train=[{train}]", f"data.valid=[{data}]"]
        code = submit.main(
            ["cluster=local", "nodes=2", "cluster.doctor=false", "checkpoint.every=2"]
            + [*keys, f"run_dir={run_dir}", *words]
        )
        printed = capsys.readouterr()
        assert code == 0, printed.err
        found = re.search(r"^job (\d+) is queued: 2 nodes, 2 processes$", printed.out, re.MULTILINE)
        assert found, printed.out
        jobs.append(Job(slurm, found[1], run_dir))
        return jobs[-1]

    yield submitted
    for job in jobs:
        slurm.run("scancel", job.number)
    slurm.wait(lambda: not slurm.run("squeue", "--noheader"), "an empty queue")
