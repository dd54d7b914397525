"""Pretrain a MiniMax-M1-shaped model.

python -m megatron_m1.pretrain model=tiny train.steps=20
torchrun --nproc-per-node 8 -m megatron_m1.pretrain model=m1_1b parallel.ep=8 data=indexed ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_m1 import launcher
from megatron_m1.config import RunConfig
from megatron_m1.config_checks import data_problems, run_problems
from megatron_m1.config_loading import main
from megatron_m1.dry_run import describe
from megatron_m1.errors import ConfigError
from megatron_m1.training import stopping

if TYPE_CHECKING:
    from megatron_m1.training.run import Run


def run(config: RunConfig) -> None:
    """Check the configuration, then describe the run or train it."""
    world = launcher.world_size()
    if config.dry_run and world == 1:
        world = config.world_size or config.parallel.smallest_world
    problems = run_problems(config, world)
    if not config.dry_run:
        problems += data_problems(config)
    if problems:
        raise ConfigError(problems)
    if config.dry_run:
        if launcher.is_first_process():
            print(describe(config, world))
        return
    # Torch and Megatron take seconds to import; what is answered above needs neither.
    stopping.listen()
    from parallel import host

    host.enable()
    from megatron_m1.runtime import processes

    with processes(config.parallel):
        pretrain(config)


def pretrain(config: RunConfig) -> Run:
    """Train over the groups that are already built; returns the finished run."""
    from megatron_m1.training.beginning import begin
    from megatron_m1.training.callbacks.defaults import default_callbacks
    from megatron_m1.training.loop import train
    from megatron_m1.training.run import build_run

    run = build_run(config)
    if begin(run):
        try:
            train(run, default_callbacks(run))
        finally:
            run.sinks.close()
    return run


if __name__ == "__main__":
    main("pretrain", RunConfig, run)
