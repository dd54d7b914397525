"""What a job can run: the programs, how each is checked before it waits in a queue, and what is
told of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_m1.config import CommonConfig, RunConfig, ScoreConfig
from megatron_m1.config_checks import data_problems, run_problems, score_problems
from megatron_m1.config_loading import load
from megatron_m1.errors import ConfigError
from megatron_m1.planning import memory
from megatron_m1.rl.config import RLConfig
from megatron_m1.rl.config_checks import as_pretraining, rl_problems
from megatron_m1.rl.config_checks import data_problems as prompts_problems

PROGRAMS = ("pretrain", "train_rl", "score", "convert")


@dataclass(frozen=True)
class Work:
    """A program with its arguments, checked for a number of processes.

    Attributes:
        program: one of ``PROGRAMS``.
        command: what follows the interpreter.
        name: short, for the queue.
        folder: where the job's script and logs go.
        saves: whether the program saves when it is told to stop, and goes on from there.
        facts: lines about it, for a person.
    """

    program: str
    command: tuple[str, ...]
    name: str
    folder: str
    saves: bool
    facts: tuple[str, ...] = ()


def plan_work(program: str, arguments: Sequence[str], world_size: int) -> Work:
    """Check a program's keys against the number of processes that the job will start.

    Raises:
        ConfigError: with every problem that the program itself would find, and before it waits.
    """
    if program == "convert":
        return _convert(arguments, world_size)
    command = ("-m", f"megatron_m1.{program}", *arguments)
    if program == "score":
        return _score(arguments, command, world_size)
    return _train(program, arguments, command, world_size)


def _train(
    program: str, arguments: Sequence[str], command: tuple[str, ...], world_size: int
) -> Work:
    config: CommonConfig
    if program == "pretrain":
        config = load(program, RunConfig, arguments)
        _refuse([*run_problems(config, world_size), *data_problems(config)])
        sized = config
    else:
        config = load(program, RLConfig, arguments)
        _refuse([*rl_problems(config, world_size), *prompts_problems(config)])
        sized = as_pretraining(config, world_size)
    if config.dry_run:
        raise ConfigError(["dry_run=true trains nothing: give --dry-run to see the job instead"])
    facts = (
        config.parallel.describe(world_size),
        f"{memory.estimate(sized, world_size).describe()}, estimated",
    )
    # A program that finds another number of processes than it was checked for is to say so.
    command = (*command, f"world_size={world_size}") if config.world_size is None else command
    name = f"{program}-{config.model.name}"
    return Work(program, command, name, config.run_dir, saves=True, facts=facts)


def _score(arguments: Sequence[str], command: tuple[str, ...], world_size: int) -> Work:
    config = load("score", ScoreConfig, arguments)
    _refuse([*score_problems(config), *config.parallel.problems(world_size)])
    facts = (config.parallel.describe(world_size),)
    return Work("score", command, "score", f"{config.out}.job", saves=False, facts=facts)


def _convert(arguments: Sequence[str], world_size: int) -> Work:
    if world_size != 1:
        raise ConfigError(
            [
                f"a conversion is one process with --workers of its own, not {world_size}: give "
                "nodes=1 cluster.gpus_per_node=0 cluster.processes_per_node=1"
            ]
        )
    command = ("tools/convert_checkpoint.py", *arguments)
    name = f"convert-{arguments[0]}" if arguments else "convert"
    return Work("convert", command, name, "runs/convert", saves=False)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError(problems)
