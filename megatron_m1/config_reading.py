"""Plain values (dictionaries, lists, numbers, text) into the dataclasses of a schema, strictly."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable
from decimal import Decimal
from typing import Any, TypeVar

_COUNT = re.compile(r"^([+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)([kKmMbBtT]?)$")
_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_MISSING = "???"

Section = TypeVar("Section")


def schema_keys(schema: type, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a schema with its annotated type. A list of dataclasses is entered
    at its first element: ``optim.phases.0.lr``."""
    keys: dict[str, Any] = {}
    for name, kind in _fields(schema).items():
        keys[prefix + name] = kind
        is_list = typing.get_origin(kind) is list
        nested = typing.get_args(kind)[0] if is_list else kind
        if dataclasses.is_dataclass(nested):
            inside = f"{prefix}{name}.0." if is_list else f"{prefix}{name}."
            keys |= schema_keys(typing.cast(type, nested), inside)
    return keys


def takes_text(kind: Any) -> bool:
    """Whether a key of this type holds text."""
    return str in (kind, *typing.get_args(kind)) and typing.get_origin(kind) is not list


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """A hint for a key that does not exist: those of the same last part, or the nearest."""
    known = list(known)
    leaf = key.split(".")[-1]
    close = [name for name in known if name.split(".")[-1] == leaf]
    close = close or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close[:3])}?"
    return f"the keys begin with {', '.join(dict.fromkeys(k for k in known if '.' not in k))}"


def read_section(schema: type[Section], values: Any, key: str, problems: list[str]) -> Section:
    """The dataclass that ``values`` describe; what is wrong with them goes to ``problems``.

    Args:
        key: where the section stands, for messages; empty for the whole configuration.
    """
    prefix = f"{key}." if key else ""
    fields = _fields(schema)
    if not isinstance(values, dict):
        problems.append(f"{key}={values} must hold the keys {', '.join(fields)}")
        return schema()
    for name in values.keys() - fields.keys():
        hint = did_you_mean(name, fields)
        problems.append(f"unknown key {prefix}{name} in the configuration: {hint}")
    return schema(
        **{
            name: _read(kind, values[name], prefix + name, problems)
            for name, kind in fields.items()
            if name in values
        }
    )


def _fields(schema: type) -> dict[str, Any]:
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def _read(kind: Any, value: Any, key: str, problems: list[str]) -> Any:
    if value == _MISSING:
        problems.append(f"{key} is missing: give {key}=...")
        return value
    if dataclasses.is_dataclass(kind):
        return read_section(typing.cast(type, kind), value, key, problems)
    if isinstance(kind, types.UnionType):
        (kind,) = (choice for choice in kind.__args__ if choice is not types.NoneType)
        if value is None:
            return None
    if typing.get_origin(kind) is list:
        return _read_list(typing.get_args(kind)[0], value, key, problems)
    if typing.get_origin(kind) is dict:
        return _read_names(typing.get_args(kind)[1], value, key, problems)
    try:
        return _READERS[kind](value)
    except (TypeError, ValueError):
        problems.append(f"{key}={_shown(value)} {_EXPECTED[kind]}")
        return value


def _read_list(kind: Any, value: Any, key: str, problems: list[str]) -> list[Any]:
    if not isinstance(value, list):
        problems.append(f"{key}={_shown(value)} is not a list: write {key}=[{_shown(value)}]")
        return []
    return [_read(kind, item, f"{key}[{i}]", problems) for i, item in enumerate(value)]


def _read_names(kind: Any, value: Any, key: str, problems: list[str]) -> dict[str, Any]:
    """Names that are not in the schema, such as those of environment variables."""
    if not isinstance(value, dict):
        problems.append(f"{key}={_shown(value)} must hold names with values")
        return {}
    return {str(name): _read(kind, item, f"{key}.{name}", problems) for name, item in value.items()}


def _read_count(value: Any) -> int:
    """``1e9``, ``4k``, ``2B`` and ``5.0`` are whole numbers too."""
    found = None if isinstance(value, bool) else _COUNT.match(str(value))
    number = Decimal(found[1]) * _SUFFIX[found[2].lower()] if found else Decimal("nan")
    if number != number.to_integral_value():
        raise ValueError(value)
    return int(number)


def _read_number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _read_switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _read_text(value: Any) -> str:
    if not isinstance(value, str | int | float):
        raise TypeError
    return str(value)


_READERS = {int: _read_count, float: _read_number, bool: _read_switch, str: _read_text}
_EXPECTED = {
    int: "is not a whole number: 1000, 1e3, 4k and 2B are",
    float: "is not a finite number",
    bool: "is neither true nor false",
    str: "is not text",
}


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
