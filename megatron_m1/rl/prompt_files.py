"""Rows of prompts in .parquet and .jsonl files, as verl lays them out or with keys of their own."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from megatron_m1.data.chat_template import Conversation
from megatron_m1.errors import InputError


@dataclass(frozen=True)
class Keys:
    """Where a row keeps what. A dot leads into a field that holds fields. The defaults are verl's.

    Attributes:
        prompt: a text, which the policy reads as it is, or a list of messages with ``role`` and
            ``content``.
        ground_truth: what the verifier needs, anything but null.
        data_source: picks the verifier.
        extra_info: fields for the verifier, which rows may lack.
    """

    prompt: str = "prompt"
    ground_truth: str = "reward_model.ground_truth"
    data_source: str = "data_source"
    extra_info: str = "extra_info"


VERL = Keys()
SKYRL = Keys(ground_truth="reward_spec.ground_truth", data_source="env_class")


@dataclass(frozen=True)
class PromptRow:
    """A row of a file."""

    prompt: str | Conversation
    ground_truth: Any
    data_source: str
    extra_info: dict[str, Any]


def read_rows(path: str | Path, keys: Keys = VERL) -> list[PromptRow]:
    """The rows of a file, all of them checked.

    Raises:
        InputError: a file that is missing, damaged, empty or of another ending, or a row that lacks
            a key or holds something else there.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise InputError(f"{path} must end in {' or '.join(_READERS)}")
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a file of prompts")
    read = _READERS[path.suffix]
    rows = [_Fields(where, fields).row(keys) for where, fields in read(path)]
    if not rows:
        raise InputError(f"{path} has no rows")
    return rows


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", fields
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet: {error}") from error


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                if line.strip():
                    yield where, json.loads(line)
            except ValueError as error:
                raise InputError(f"{where} is not JSON: {error}") from error


_READERS = {".parquet": _parquet_rows, ".jsonl": _json_rows}


class _Fields:
    """One row as it was read, and where."""

    def __init__(self, where: str, fields: Any) -> None:
        self._where, self._fields = where, fields
        if not isinstance(fields, dict):
            raise InputError(f"{where} is a {type(fields).__name__}; a row must be an object")

    def row(self, keys: Keys) -> PromptRow:
        data_source = self._get(keys.data_source)
        if not isinstance(data_source, str):
            raise self._error(keys.data_source, data_source, "a text")
        prompt = self._get(keys.prompt)
        if not isinstance(prompt, str) and not _is_conversation(prompt):
            raise self._error(
                keys.prompt, prompt, "a text, or a list of messages with the texts role and content"
            )
        extra_info = self._fields.get(keys.extra_info)
        if extra_info is None:
            extra_info = {}
        if not isinstance(extra_info, dict):
            raise self._error(keys.extra_info, extra_info, "an object")
        return PromptRow(prompt, self._get(keys.ground_truth), data_source, extra_info)

    def _get(self, key: str) -> Any:
        """What is at the end of a key's path, never None."""
        found, path = self._fields, key.split(".")
        for depth, name in enumerate(path):
            if not isinstance(found, dict) or found.get(name) is None:
                above = repr(".".join(path[:depth])) if depth else "the row"
                raise InputError(f"{self._where} has no {key!r}: {above} {_contents(found)}")
            found = found[name]
        return found

    def _error(self, key: str, value: Any, wanted: str) -> InputError:
        return InputError(f"{self._where}: {key!r} is {reprlib.repr(value)}; it must be {wanted}")


def _contents(value: Any) -> str:
    """What is where something was looked for."""
    if not isinstance(value, dict):
        return f"is {reprlib.repr(value)}"
    return f"has {', '.join(f'{k} (null)' if v is None else k for k, v in value.items())}"


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in value
        )
    )
