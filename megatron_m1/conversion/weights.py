"""The parameters of a model in whatever format they are stored."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from megatron_m1.checkpoint.mapping import MappedParameter
from megatron_m1.conversion.safetensors_file import Form
from megatron_m1.model.config import ModelConfig

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Tensors(Protocol):
    """Named tensors that are read one at a time."""

    @property
    def names(self) -> set[str]: ...

    def form(self, name: str) -> Form: ...

    def read(self, name: str, slot: int | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Weights:
    """A model's parameters, by our names, in the tensors of some format."""

    model: ModelConfig
    parameters: Mapping[str, MappedParameter]
    tensors: Tensors

    def read(self, name: str) -> Tensor:
        """A whole parameter as Megatron keeps it."""
        mapped = self.parameters[name]
        parts = [self.tensors.read(theirs, mapped.slot) for theirs, _ in mapped.theirs]
        return mapped.operation.flat(mapped.operation.pack(parts, self.model))

    def dtype(self, name: str) -> torch.dtype:
        """The type of a parameter: the widest of the tensors that hold it."""
        return widest(self.tensors.form(theirs).dtype for theirs, _ in self.parameters[name].theirs)

    def expected(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor that the model needs."""
        return {name: shape for mapped in self.parameters.values() for name, shape in mapped.theirs}

    def name_problems(self, known: Collection[str] = ()) -> list[str]:
        """Which tensors are missing, and which are there that nothing needs.

        Args:
            known: names that may be there or not.
        """
        expected, names = self.expected(), self.tensors.names
        missing = [name for name in expected if name not in names]
        unexpected = sorted(names - expected.keys() - set(known))
        found = []
        if missing:
            found.append(f"{len(missing)} of {len(expected)} tensors are missing: {shown(missing)}")
        if unexpected:
            found.append(f"{len(unexpected)} tensors are not of this model: {shown(unexpected)}")
        return found

    def form_problems(self) -> list[str]:
        """Which tensors that are there have another shape than the model's, or are no floats."""
        found, names = [], self.tensors.names
        for name, shape in self.expected().items():
            form = self.tensors.form(name) if name in names else None
            if form and form.shape != shape:
                found.append(f"{name} is {list(form.shape)}, the configuration says {list(shape)}")
            elif form and form.dtype not in FLOATS:
                found.append(f"{name} is {form}: quantised weights cannot be converted")
        return found[:3] + [f"and {len(found) - 3} more tensors like that"] * (len(found) > 3)


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The type that holds the values of all."""
    return reduce(torch.promote_types, dtypes)


def shown(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
