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
from megatron_m1.dry_run import as_yaml, describe
from megatron_m1.errors import ConfigError, InputError
from megatron_m1.files import whole

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
    from parallel import host

    host.enable()
    from megatron_m1.runtime import processes

    with processes(config.parallel):
        pretrain(config)


def pretrain(config: RunConfig) -> Run:
    """Train over the groups that are already built; returns the finished run."""
    from megatron_m1.checkpoint.choosing import chosen
    from megatron_m1.checkpoint.starting import start
    from megatron_m1.training.callbacks.defaults import default_callbacks
    from megatron_m1.training.loop import train
    from megatron_m1.training.run import build_run

    run = build_run(config)
    asked = config.checkpoint
    with chosen(asked.load, run.checkpoint_dir, asked.verify) as checkpoint:
        if checkpoint:
            started = start(run, checkpoint)
    if launcher.is_first_process():
        _open_folders(run)
        if checkpoint:
            print(started, flush=True)
        if run.finished:
            print("nothing is left to train: give more train.steps, or another run_dir")
    if run.finished:
        return run
    run.open_sinks()
    try:
        train(run, default_callbacks(run))
    finally:
        run.sinks.close()
    return run


def _open_folders(run: Run) -> None:
    """Make the run's folders before the first step, so that a path that cannot be written does not
    end the run at its first checkpoint."""
    try:
        run.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        run.dir.mkdir(parents=True, exist_ok=True)
        with whole(run.dir / "config.yaml") as partial:
            partial.write_text(as_yaml(run.config))
    except OSError as error:
        raise InputError(f"run_dir={run.dir} or checkpoint.dir: {error}") from error


if __name__ == "__main__":
    main("pretrain", RunConfig, run)
