"""From the command line to a checked dataclass: Hydra's groups and overrides, read strictly.

Hydra lets ``+key=`` and ``++key=`` add keys that nothing reads, refuses ``1e9`` for a count, and
stops at the first problem. Overrides are therefore checked against the schema before Hydra sees
them, and the finished configuration is checked as a whole.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_m1.errors import ConfigError, UserError

CONF = Path(__file__).resolve().parent.parent / "conf"
_OVERRIDE = re.compile(r"^(?P<prefix>[+~]*)(?P<key>[\w./@-]+)(=(?P<value>.*))?$", re.DOTALL)
_COUNT = re.compile(r"^([+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)([kKmMbBtT]?)$")
_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}

Config = TypeVar("Config")


def parse_count(text: str) -> int | None:
    """``1e9``, ``4k``, ``2B`` or ``5.0`` as a whole number; None where the text is not one."""
    found = _COUNT.match(text)
    if not found:
        return None
    value = float(found[1]) * _SUFFIX[found[2].lower()]
    return int(value) if value == int(value) else None


def schema_keys(schema: type) -> dict[str, Any]:
    """Every dotted key of a schema with its annotated type; a section maps to its dataclass."""
    keys: dict[str, Any] = {}
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        keys[field.name] = kind
        if dataclasses.is_dataclass(kind):
            nested = schema_keys(typing.cast(type, kind))
            keys.update({f"{field.name}.{key}": value for key, value in nested.items()})
    return keys


def groups() -> list[str]:
    """The folders under conf/: what ``group=option`` may choose from."""
    return sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())


def check_overrides(arguments: Sequence[str], schema: type) -> list[str]:
    """The arguments for Hydra, counts written out.

    Raises:
        ConfigError: with every argument that names no key of the schema.
    """
    keys, problems, checked = schema_keys(schema), [], []
    for argument in arguments:
        found = None if argument.startswith("-") else _OVERRIDE.match(argument)
        if not found or found["key"].split(".")[0] == "hydra":
            checked.append(argument)
            continue
        key, value = found["key"], found["value"]
        if key in groups() and key not in keys or _is_group_choice(key, value, keys):
            checked.append(argument)
        elif key not in keys:
            problems.append(f"unknown key {found['prefix']}{key}{_did_you_mean(key, keys)}")
        elif found["prefix"]:
            problems.append(
                f"{found['prefix']}{key}: the key exists, write it as {key}={value or ''}"
            )
        else:
            checked.append(f"{key}={_write_out(keys[key], value or '')}")
    if problems:
        raise ConfigError(problems)
    return checked


def _is_group_choice(key: str, value: str | None, keys: dict[str, Any]) -> bool:
    return key in groups() and bool(value) and not value.startswith(("{", "["))  # type: ignore[union-attr]


def _did_you_mean(key: str, keys: dict[str, Any]) -> str:
    close = difflib.get_close_matches(key, [*keys, *groups()], n=1, cutoff=0.5)
    if not close:
        leaf = key.split(".")[-1]
        close = [known for known in keys if known.split(".")[-1] == leaf][:1]
    return f": did you mean {close[0]}?" if close else f": known groups are {', '.join(groups())}"


def _write_out(kind: Any, value: str) -> str:
    """A count in an integer key (or list of them) becomes digits; anything else stays."""
    accepted = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if int not in accepted:
        return value
    count = parse_count(value)
    return value if count is None else str(count)


def to_dataclass(config: DictConfig, schema: type[Config]) -> Config:
    """A plain dataclass from Hydra's result.

    Raises:
        ConfigError: a value is missing.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError([f"{key} is missing: give {key}=..." for key in missing])
    return typing.cast(Config, OmegaConf.to_object(config))


def main(name: str, schema: type[Config], run: Callable[[Config], None]) -> None:
    """Entry point of a program: read the command line, run, and end with its exit code.

    Args:
        name: the file under conf/ that the program starts from, without its ending.
        schema: the dataclass that describes every key.
        run: the program.
    """
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    try:
        sys.argv[1:] = check_overrides(sys.argv[1:], schema)

        @hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)
        def program(config: DictConfig) -> None:
            run(to_dataclass(config, schema))

        # Hydra prints an error and exits by itself unless it is told to raise.
        program()
    except UserError as error:
        raise SystemExit(report(error)) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise SystemExit(report(ConfigError([_first_sentence(error)]))) from None


def load(name: str, schema: type[Config], overrides: Sequence[str] = ()) -> Config:
    """The configuration of a program as a library call, for tools and tests."""
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = hydra.compose(name, overrides=check_overrides(overrides, schema))
    return to_dataclass(config, schema)


def report(error: UserError) -> int:
    """Print a user's error once (on the first process) and give its exit code."""
    import os

    if os.environ.get("RANK", "0") == "0":
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
    return error.exit_code


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__
