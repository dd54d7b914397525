"""Pretrain a MiniMax-M1-shaped model.

python -m megatron_m1.pretrain model=tiny train.steps=20
torchrun --nproc-per-node 8 -m megatron_m1.pretrain model=m1_1b parallel.ep=8 data=indexed ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_m1.config import RunConfig
from megatron_m1.config_checks import data_problems, run_problems
from megatron_m1.config_loading import main
from megatron_m1.dry_run import describe
from megatron_m1.training.program import run_program

if TYPE_CHECKING:
    from megatron_m1.training.run import Run


def run(config: RunConfig) -> None:
    """Check the configuration, then describe the run or train it."""
    run_program(config, run_problems, data_problems, describe, pretrain)


def pretrain(config: RunConfig) -> Run:
    """Train over the groups that are already built; returns the finished run."""
    from megatron_m1.training.beginning import begin
    from megatron_m1.training.callbacks.defaults import default_callbacks
    from megatron_m1.training.loop import train
    from megatron_m1.training.run import build_run
    from megatron_m1.training.watchdog import watched

    run = build_run(config)
    if begin(run):
        try:
            with watched(run, config.train.watchdog_seconds):
                train(run, default_callbacks(run))
        finally:
            run.sinks.close()
    return run


if __name__ == "__main__":
    main("pretrain", RunConfig, run)
