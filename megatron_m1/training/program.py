"""What the programs that train have in common: checks, the dry run, processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megatron_m1 import launcher
from megatron_m1.config import CommonConfig
from megatron_m1.errors import ConfigError
from megatron_m1.training import stopping

Config = TypeVar("Config", bound=CommonConfig)


def run_program(
    config: Config,
    problems: Callable[[Config, int], list[str]],
    data_problems: Callable[[Config], list[str]],
    describe: Callable[[Config, int], str],
    train: Callable[[Config], object],
) -> None:
    """Check the configuration, then describe the run or train it over its process groups.

    Args:
        problems: what is wrong with a configuration for a number of processes.
        data_problems: what is wrong with the data, which a dry run does not need.

    Raises:
        ConfigError: something is wrong.
    """
    world = launcher.world_size()
    if config.dry_run and world == 1:
        world = config.world_size or config.parallel.smallest_world
    found = problems(config, world)
    if not config.dry_run:
        found += data_problems(config)
    if found:
        raise ConfigError(found)
    if config.dry_run:
        if launcher.is_first_process():
            print(describe(config, world))
        return
    stopping.listen()
    # Torch and Megatron take seconds to import; what is answered above needs neither.
    from parallel import host

    host.enable()
    from megatron_m1.runtime import processes

    with processes(config.parallel):
        train(config)
