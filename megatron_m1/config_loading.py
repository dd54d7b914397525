"""From the command line to a checked dataclass: Hydra's groups and overrides, read strictly.

Hydra composes plain values; ``config_reading`` fills the dataclasses with them. A schema in Hydra's
own keeping would let ``+key=`` add keys that nothing reads, refuse ``1e9`` for a count, stop at the
first problem and explain it on ten lines.
"""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_m1 import launcher
from megatron_m1.cluster import failures
from megatron_m1.config_reading import did_you_mean, read_section, schema_keys, takes_text
from megatron_m1.errors import ConfigError, Stopped, UserError

CONF = Path(__file__).resolve().parent.parent / "conf"
_OVERRIDE = re.compile(r"^(?P<sign>[+~]*)(?P<key>[\w./@-]+)(=(?P<value>.*))?$", re.DOTALL)
_VERBATIM = re.compile(r"""'.*'|".*"|null""", re.DOTALL)
_LAST_WORDS = 5.0

Config = TypeVar("Config")


def main(name: str, schema: type[Config], run: Callable[[Config], None]) -> None:
    """Entry point of a program: read the command line, run, and end with its exit code.

    Args:
        name: the file under conf/ that the program starts from, without its ending.
        schema: the dataclass that describes every key.
        run: the program.
    """
    arguments = sys.argv[1:]
    try:
        if any(argument.startswith("-") for argument in arguments):
            _run_by_hydra(name, schema, run)
        else:
            run(load(name, schema, arguments))
    except UserError as error:
        raise SystemExit(report(error)) from None
    except Exception as error:
        failures.record(error)
        raise


def load(name: str, schema: type[Config], overrides: Sequence[str] = ()) -> Config:
    """The configuration of a program.

    Raises:
        ConfigError: with every problem of the first kind met: arguments that name no key, files
            that do not compose, values of the wrong type.
    """
    _check_arguments(overrides, schema)
    _store_defaults(name, schema)
    arguments = [_quote_text(argument, schema_keys(schema)) for argument in overrides]
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            return _to_dataclass(hydra.compose(name, overrides=arguments), schema)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([_one_sentence(error)]) from error


def report(error: UserError) -> int:
    """Print a user's error once and give its exit code."""
    if isinstance(error, Stopped):
        return _report_stop(error)
    failures.record(error)
    where = ""
    if not launcher.is_first_process():
        # What is wrong for all is said by the first process, and torchrun ends the others with it.
        # What is wrong on this process alone must still be said.
        time.sleep(_LAST_WORDS)
        where = f" (process {launcher.rank()})"
    for line in str(error).splitlines():
        print(f"error{where}: {line}", file=sys.stderr)
    return error.exit_code


def _report_stop(stopped: Stopped) -> int:
    """All processes stopped alike, so one says it and none waits."""
    # A launcher ends the others with a signal when the first is gone, and code and saved state
    # would seem lost: Python drops handlers while it shuts down, but keeps this.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if launcher.is_first_process():
        print(stopped, file=sys.stderr)
    return stopped.exit_code


def _run_by_hydra(name: str, schema: type[Config], run: Callable[[Config], None]) -> None:
    """What has flags (--cfg, --help, --multirun, --config-dir) is for Hydra's own entry point."""
    # A flag's value stands alone: --cfg job.
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    _check_arguments([word for word in words if "=" in word or word[:1] in ("+", "~")], schema)
    _store_defaults(name, schema)

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)
    def program(config: DictConfig) -> None:
        try:
            run(_to_dataclass(config, schema))
        except UserError as error:
            # Hydra would print a traceback of any other exception.
            raise SystemExit(report(error)) from None

    program()


def _check_arguments(arguments: Sequence[str], schema: type) -> None:
    keys = schema_keys(schema)
    groups = _groups(keys)
    problems = []
    for argument in arguments:
        found = _OVERRIDE.match(argument)
        if not found or (found["value"] is None and not found["sign"]):
            problems.append(f"{argument} is not of the form KEY=VALUE")
            continue
        sign, key, value = found["sign"], found["key"], found["value"] or "VALUE"
        if re.split(r"[./]", key)[0] == "hydra":
            continue
        if re.sub(r"\.\d+\.", ".0.", key) not in keys and key not in groups:
            problems.append(f"unknown key {sign}{key}: {did_you_mean(key, [*keys, *groups])}")
        elif "~" in sign:
            problems.append(f"{sign}{key}: keys cannot be removed, write {key}={value}")
        elif sign:
            problems.append(f"{sign}{key}: the key exists already, write {key}={value}")
    if problems:
        raise ConfigError(problems)


def _groups(keys: Container[str]) -> list[str]:
    """The folders under conf/ that belong to a program: what its ``group=option`` may choose
    from."""
    folders = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())
    return [name for name in folders if name in keys or name == "experiment"]


def _quote_text(argument: str, keys: dict[str, Any]) -> str:
    """Text keeps its spaces, commas and brackets, which are Hydra's grammar otherwise."""
    key, _, value = argument.partition("=")
    if not takes_text(keys.get(key)) or _VERBATIM.fullmatch(value):
        return argument
    # Backslashes count in Hydra's grammar only before a quote.
    doubled = re.sub(r"(\\+)(?='|$)", r"\1\1", value)
    quoted = doubled.replace("'", r"\'")
    return f"{key}='{quoted}'"


def _store_defaults(name: str, schema: type[Any]) -> None:
    ConfigStore.instance().store(name=f"{name}_schema", node=asdict(schema()))


def _to_dataclass(config: DictConfig, schema: type[Config]) -> Config:
    problems: list[str] = []
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError([_one_sentence(error)]) from error
    result = read_section(schema, values, "", problems)
    if problems:
        raise ConfigError(problems)
    return result


def _one_sentence(error: Exception) -> str:
    """Hydra's and OmegaConf's first line, or their meaning where they need several."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        return f"{group}={option} is not one of {', '.join(error.options)}"
    first = next(iter(str(error).splitlines()), type(error).__name__)
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read: {first}"
    return first
