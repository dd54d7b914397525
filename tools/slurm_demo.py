"""A small model trained by a real Slurm job on two nodes, both of which are this machine.

    make slurm-demo

Boots a Slurm of its own (packages ``slurm-wlm`` and ``munge``), submits a run behind the check of
the nodes, asks it after some steps to save and to leave, lets it be queued again, and shows how it
goes on to its end. Nothing of it stays but the run in runs/slurm_demo.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_m1.cluster.local_slurm import LocalSlurm, local_slurm, missing_packages

ROOT = Path(__file__).resolve().parents[1]
_RUN = "runs/slurm_demo"
_COMMAND = (
    *("cluster=local", "nodes=2", "model=tiny", "model.num_layers=4", "model.layer_pattern=LLLS"),
    *("train.steps=40", "train.micro_batch=2", "train.seq_length=256", "data.corpus_bytes=2M"),
    *("data.folder=data/stdlib_2m", "logger=quiet", f"run_dir={_RUN}"),
)


def main() -> int:
    """Return the exit code: that of a missing package, or 0."""
    missing = missing_packages()
    if missing:
        print(f"error: {missing}", file=sys.stderr)
        return 1
    shutil.rmtree(ROOT / _RUN, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, local_slurm(Path(folder)) as slurm:
        print(slurm.run("sinfo"))
        number = _submitted(slurm)
        log = ROOT / _RUN / "slurm" / f"{number}.out"
        steps = ROOT / _RUN / "metrics.jsonl"
        slurm.wait(lambda: _lines(steps) >= 10, "ten steps", limit=300)
        print("# asking it to stop: scancel --signal=USR1", number)
        slurm.run("scancel", "--signal=USR1", number)
        slurm.wait(lambda: _waits_again(slurm, number), "the job to be queued again", limit=120)
        slurm.wait(lambda: _is_over(slurm, number), "the end", limit=300)
        print(log.read_text())
    print(f"{_lines(steps)} steps are in {steps.relative_to(ROOT)}")
    return 0


def _submitted(slurm: LocalSlurm) -> str:
    done = subprocess.run(
        [sys.executable, "tools/submit.py", *_COMMAND],
        env=slurm.environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    print(done.stdout)
    return next(line for line in done.stdout.splitlines() if line.startswith("job ")).split()[1]


def _waits_again(slurm: LocalSlurm, number: str) -> bool:
    return "Restarts=1" in slurm.run("scontrol", "show", "job", number)


def _is_over(slurm: LocalSlurm, number: str) -> bool:
    slurm.shorten_hold(number)
    shown = slurm.run("scontrol", "show", "job", number)
    return "JobState=COMPLETED" in shown or "JobState=FAILED" in shown


def _lines(path: Path) -> int:
    if not path.exists():
        return 0
    return sum('"train/loss"' in line for line in path.read_text().splitlines())


if __name__ == "__main__":
    sys.exit(main())
