"""The runs of tools/compare_rl.py: which there are, and bringing one to its end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_m1.config_loading import load
from megatron_m1.dry_run import as_yaml
from megatron_m1.errors import InputError
from megatron_m1.observe.records import METRICS_FILE, read_records
from megatron_m1.rl.config import RLConfig

ROOT = Path(__file__).resolve().parents[1]
# GRPO has no overlong penalty; the experiment gives DAPO's to the others.
OBJECTIVES = {
    "grpo": ["rl=grpo", "rl.overlong_buffer=0"],
    "dapo": ["rl=dapo"],
    "cispo": ["rl=cispo"],
}


@dataclass(frozen=True)
class Run:
    """One run: its folder, its configuration, and that as arguments of the program."""

    folder: Path
    config: RLConfig
    arguments: list[str]

    def is_finished(self) -> bool:
        """Whether its last step is recorded.

        Raises:
            InputError: the folder holds a run of another configuration.
        """
        stored = self.folder / "config.yaml"
        if not stored.exists():
            return False
        if stored.read_text() != as_yaml(self.config):
            raise InputError(
                f"{self.folder} holds a run of another configuration: give another --out, or the "
                "keys that it was made with"
            )
        metrics = self.folder / METRICS_FILE
        steps = [record["step"] for record in read_records(metrics)] if metrics.exists() else []
        return max(steps, default=0) >= self.config.train.steps

    def complete(self) -> None:
        """Run the program to its end, unless that is done.

        Raises:
            InputError: it failed.
        """
        if self.is_finished():
            print(f"{self.folder.name}: finished before", flush=True)
            return
        command = [sys.executable, "-m", "megatron_m1.train_rl", *self.arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["without a word"]
            raise InputError(f"{self.folder} ended with {done.returncode}: {lines[-1]}")
        print(f"{self.folder.name}: done", flush=True)


def planned(
    out: Path, objectives: Sequence[str], seeds: Sequence[int], taught: Path, keys: Sequence[str]
) -> dict[str, list[Run]]:
    """The runs of each objective, one for each seed."""
    return {
        name: [
            _run(
                out / f"{name}-{seed}",
                *keys,
                *OBJECTIVES[name],
                "teach.steps=0",
                f"checkpoint.load={taught}",
                f"seed={seed}",
            )
            for seed in seeds
        ]
        for name in objectives
    }


def teacher(out: Path, keys: Sequence[str]) -> Run:
    """The run that teaches; the program ends with a step of RL, which nobody looks at."""
    run = _run(out / "teacher", *keys, "train.steps=1")
    # The program stores what it taught as what it started from.
    checkpoint = replace(run.config.checkpoint, load=str(run.folder / "taught"))
    return replace(run, config=replace(run.config, checkpoint=checkpoint))


def _run(folder: Path, *arguments: str) -> Run:
    quiet = ["logger=quiet", "train.report=false", f"run_dir={folder}"]
    arguments = ("experiment=compare_rl", *arguments, *quiet)
    return Run(folder, load("train_rl", RLConfig, arguments), [*arguments])
