"""How a model's tensors are divided over the files of a target, before any is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch

from megatron_m1.checkpoint.mapping import MappedParameter
from megatron_m1.conversion.safetensors_file import Form
from megatron_m1.conversion.weights import Weights, widest

# What --dtype may be; "stored" keeps each tensor's own.
DTYPES = {"stored": None, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shard:
    """One file.

    Attributes:
        parameters: whose tensors it holds, by our names.
        derived: tensors that it holds beside them, by their names.
        size: bytes of its tensors.
    """

    file: str
    parameters: tuple[str, ...]
    derived: tuple[str, ...]
    size: int


def target_forms(
    weights: Weights, target: Mapping[str, MappedParameter], dtype: str
) -> dict[str, Form]:
    """Every tensor of the target.

    Args:
        dtype: a key of ``DTYPES``. MiniMax keeps the router in FP32, and so does bf16 here.
    """
    found: dict[str, Form] = {}
    for ours, mapped in target.items():
        for name, shape in mapped.theirs:
            dtypes = [found[name].dtype] if name in found else []
            found[name] = Form(widest([*dtypes, _dtype(weights, ours, mapped, dtype)]), shape)
    return found


def _dtype(weights: Weights, ours: str, mapped: MappedParameter, dtype: str) -> torch.dtype:
    asked = DTYPES[dtype]
    if asked is None:
        return weights.dtype(ours)
    return torch.float32 if mapped.is_router else asked


def divide(
    target: Mapping[str, MappedParameter],
    forms: Mapping[str, Form],
    derived: Mapping[str, Form],
    limit: int,
    name: Callable[[int, int], str],
    whole_tensors: bool,
) -> tuple[Shard, ...]:
    """Files of at most ``limit`` bytes, or of one tensor where that is more.

    Args:
        name: the file's name from its number and the number of files.
        whole_tensors: a tensor that stacks many parameters is not divided over files.
    """
    groups: list[list[Shard]] = [[]]
    size = 0
    for unit in _units(target, forms, derived, whole_tensors):
        if groups[-1] and size + unit.size > limit:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += unit.size
    return tuple(
        Shard(
            name(number, len(groups)),
            tuple(ours for unit in units for ours in unit.parameters),
            tuple(extra for unit in units for extra in unit.derived),
            sum(unit.size for unit in units),
        )
        for number, units in enumerate(groups)
    )


def _units(
    target: Mapping[str, MappedParameter],
    forms: Mapping[str, Form],
    derived: Mapping[str, Form],
    whole_tensors: bool,
) -> Iterator[Shard]:
    """What must stay in one file."""

    def key(item: tuple[str, MappedParameter]) -> str:
        return item[1].theirs[0][0] if whole_tensors else item[0]

    for _, group in groupby(target.items(), key):
        mapped = dict(group)
        yield Shard("", tuple(mapped), (), sum(_size(one, forms) for one in mapped.values()))
    for name, form in derived.items():
        yield Shard("", (), (name,), form.size)


def _size(mapped: MappedParameter, forms: Mapping[str, Form]) -> int:
    """Bytes of a parameter in its target."""
    parts = 1 if mapped.slot is None else mapped.theirs[0][1][0]
    return sum(forms[name].size for name, _ in mapped.theirs) // parts
