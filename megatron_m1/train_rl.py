"""Train a MiniMax-M1-shaped model by reinforcement learning.

python -m megatron_m1.train_rl experiment=rl_tiny
torchrun --nproc-per-node 8 -m megatron_m1.train_rl checkpoint.load=runs/a data.files=[math.jsonl]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_m1.config_loading import main
from megatron_m1.rl.config import RLConfig
from megatron_m1.rl.config_checks import data_problems, rl_problems
from megatron_m1.rl.dry_run import describe
from megatron_m1.training.program import run_program

if TYPE_CHECKING:
    from megatron_m1.rl.state import RLRun


def run(config: RLConfig) -> None:
    """Check the configuration, then describe the run or train it."""
    run_program(config, rl_problems, data_problems, describe, train)


def train(config: RLConfig) -> RLRun:
    """Teach where asked, then train over the groups that are already built; returns the finished
    run."""
    from megatron_m1.rl.callbacks import default_callbacks
    from megatron_m1.rl.loop import train_rl
    from megatron_m1.rl.start import rl_run
    from megatron_m1.rl.teaching import taught
    from megatron_m1.training.beginning import begin

    with rl_run(taught(config)) as run:
        if begin(run):
            try:
                train_rl(run, default_callbacks(run))
            finally:
                run.sinks.close()
    return run


if __name__ == "__main__":
    main("train_rl", RLConfig, run)
