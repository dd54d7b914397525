"""Pretrain a MiniMax-M1-shaped model.

python -m megatron_m1.pretrain model=tiny train.steps=20
torchrun --nproc-per-node 8 -m megatron_m1.pretrain model=m1_1b parallel.ep=8 data=indexed ...
"""

from __future__ import annotations

from parallel import host

host.enable()

from megatron_m1 import runtime  # noqa: E402
from megatron_m1.checkpoint import store  # noqa: E402
from megatron_m1.config import RunConfig, run_problems  # noqa: E402
from megatron_m1.config_loading import main  # noqa: E402
from megatron_m1.dry_run import describe, write_config  # noqa: E402
from megatron_m1.errors import ConfigError  # noqa: E402
from megatron_m1.training.callbacks import default_callbacks  # noqa: E402
from megatron_m1.training.loop import train  # noqa: E402
from megatron_m1.training.run import Run, build_run  # noqa: E402


def run(config: RunConfig) -> None:
    world = runtime.world_size()
    if config.dry_run and world == 1:
        world = config.parallel.smallest_world
    problems = run_problems(config, world)
    if problems:
        raise ConfigError(problems)
    if config.dry_run:
        print(describe(config, world))
        return
    with runtime.processes(config.parallel):
        pretrain(config)


def pretrain(config: RunConfig) -> Run:
    """Train over the groups that are already built; returns the finished run."""
    run = build_run(config)
    checkpoint = store.find(config.checkpoint.load) or store.find_latest(run.checkpoint_dir)
    if checkpoint:
        store.load(run, checkpoint)
    if runtime.is_first_process():
        write_config(config)
    run.open_sinks()
    if run.finished and runtime.is_first_process():
        print(
            f"{checkpoint} is at step {run.progress.step}: nothing is left to train; give more "
            "train.steps, or another run_dir"
        )
    run.callbacks = default_callbacks(run)
    try:
        train(run)
    finally:
        run.sinks.close()
    return run


if __name__ == "__main__":
    main("pretrain", RunConfig, run)
