"""Safetensors files, a tensor at a time: read one without the others, write one after another.

The library of that name writes a file from tensors that are all in memory, and its memory maps
count as the process's own. Here the peak is one tensor. A file is eight bytes with the length of a
JSON header, the header (name: dtype, shape, first and last byte), and the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from megatron_m1.checkpoint.disk import HashedFile
from megatron_m1.checkpoint.manifest import Entry
from megatron_m1.errors import InputError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LENGTH = 8
_LONGEST_HEADER = 100_000_000  # the library's own limit


@dataclass(frozen=True)
class Form:
    """What a tensor is, without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: ``start`` counts from the first byte of the file."""

    file: Path
    form: Form
    start: int

    def read(self, slot: int | None = None) -> Tensor:
        """The tensor, or part ``slot`` of its first axis.

        Raises:
            InputError: the file cannot be read, or ends before the tensor does.
        """
        shape = self.form.shape if slot is None else self.form.shape[1:]
        tensor = torch.empty(shape, dtype=self.form.dtype)
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.start + (slot or 0) * tensor.nbytes)
                _fill(tensor, file, self.file)
        except OSError as error:
            raise InputError(f"{self.file} cannot be read: {error.strerror}") from error
        return tensor


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file.

    Raises:
        InputError: it is missing, truncated or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            if size < _LENGTH or length > min(size - _LENGTH, _LONGEST_HEADER):
                raise InputError(f"{path} is truncated or no safetensors file ({size} bytes)")
            header = json.loads(file.read(length), object_pairs_hook=_without_doubles)
        return _tensors(header, path, _LENGTH + length, size)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not a safetensors file: {error}") from error


def _tensors(header: dict[str, Any], path: Path, begin: int, size: int) -> dict[str, StoredTensor]:
    """The header's entries, each where the one before it ends; the last ends with the file."""
    header.pop("__metadata__", None)
    found, end = {}, begin
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} has the unknown dtype {entry['dtype']}")
        form = Form(DTYPES[entry["dtype"]], tuple(entry["shape"]))
        first, last = entry["data_offsets"]
        if any(type(number) is not int for number in (first, last, *form.shape)):
            raise ValueError(f"a size or place of {name} is not a whole number")
        if begin + first != end or last - first != form.size or min(form.shape, default=0) < 0:
            raise ValueError(f"the bytes of {name} are not where its header says")
        found[name] = StoredTensor(path, form, end)
        end = begin + last
    if end != size:
        raise InputError(
            f"{path} is truncated or damaged: it has {size} bytes, its header speaks of {end}"
        )
    return found


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header names a tensor twice")
    return found


def _fill(tensor: Tensor, file: Any, path: Path) -> None:
    target = memoryview(_as_bytes(tensor))
    while len(target):
        count = file.readinto(target)
        if not count:
            raise InputError(f"{path} is truncated: {len(target)} bytes are missing")
        target = target[count:]


def _as_bytes(tensor: Tensor) -> Any:
    """The tensor's memory as an array of bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


class SafetensorsWriter:
    """A file whose tensors are known by form before they come, in that order, whole or in the parts
    of their first axis. A context manager; at its end the file is on the disk."""

    def __init__(self, path: Path, forms: Mapping[str, Form]) -> None:
        header = _header(forms)
        self._file = HashedFile(path)
        self._file.write(len(header).to_bytes(_LENGTH, "little") + header)
        self._ends, end = {}, self._file.tell()
        for name, form in forms.items():
            end += form.size
            self._ends[name] = end
        self._size = end

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor or its next part."""
        before = self._ends[name] - self._file.tell()
        assert tensor.nbytes <= before, f"{name} comes too late or has too many bytes"
        self._file.write(memoryview(_as_bytes(tensor)))

    @property
    def entry(self) -> Entry:
        """Size and hash of the file."""
        return self._file.entry

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, trace)
        assert error or self._file.tell() == self._size, "tensors are missing"


def _header(forms: Mapping[str, Form]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, form in forms.items():
        entries[name] = {
            "dtype": _CODES[form.dtype],
            "shape": list(form.shape),
            "data_offsets": [start, start + form.size],
        }
        start += form.size
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % _LENGTH)
