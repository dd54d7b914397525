"""The parameters of a model chunk by their names in the whole model, and a rank's part of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from megatron_m1.checkpoint.mapping import Copy, MappedParameter, mapped_parameters
from megatron_m1.model.config import ModelConfig

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight$")
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)$")


@dataclass(frozen=True)
class LocalParameter:
    """A parameter on this rank: part ``rank`` of ``size`` of the one in the whole model."""

    mapped: MappedParameter
    parameter: nn.Parameter
    rank: int
    size: int

    def part(self, packed: Tensor) -> Tensor:
        """This rank's part of a tensor that ``mapped.operation.pack`` made."""
        axis = self.mapped.operation.axis
        if axis is not None:
            packed = packed.chunk(self.size, dim=axis)[self.rank]
        return packed.reshape(self.parameter.shape)


def local_parameters(chunk: nn.Module, model: ModelConfig) -> Iterator[LocalParameter]:
    """Every parameter of a ``MiniMaxM1`` chunk (without Megatron's wrappers).

    Raises:
        KeyError: a parameter that the mapping does not know.
    """
    known = mapped_parameters(model)
    for name, parameter in chunk.named_parameters():
        mapped = known[_global_name(name, chunk)]
        group = _group(chunk, mapped.is_expert)
        yield LocalParameter(mapped, parameter, group.rank(), group.size())


def _group(chunk: nn.Module, is_expert: bool) -> torch.distributed.ProcessGroup:
    groups = chunk.pg_collection
    return groups.expt_tp if is_expert else groups.tp  # type: ignore[union-attr]


def _global_name(name: str, chunk: nn.Module) -> str:
    """``decoder.layers.0...`` of a later stage carries the layer's number in the whole model, and a
    local expert its number among all, in Megatron's sequential and grouped experts alike."""
    found = _LAYER.match(name)
    if not found:
        return name
    layer = chunk.decoder.layers[int(found[1])]  # type: ignore[union-attr,index]
    rest = name[found.end() :]
    expert, grouped = _EXPERT.search(rest), _GROUPED_EXPERT.search(rest)
    if expert:
        number = layer.mlp.local_expert_indices[int(expert[1])]
        rest = f"mlp.experts.{number}.{expert[2]}.weight"
    elif grouped:
        number = layer.mlp.local_expert_indices[int(grouped[2])]
        rest = f"mlp.experts.{number}.{grouped[1]}.weight"
    return f"decoder.layers.{layer.layer_number - 1}.{rest}"


def mark_parallel(chunk: nn.Module, model: ModelConfig) -> None:
    """Tell Megatron how each parameter is cut, which the gradient norm and the reduction ask.

    Megatron marks parameters while it initialises them, which we do ourselves. Experts are always
    marked as such (``allreduce=False``): Megatron does so only for ep > 1, and with ep = 1, tp > 1
    would then miss that tensor-parallel ranks bring different tokens.
    """
    for local in local_parameters(chunk, model):
        axis = local.mapped.operation.axis
        if axis is not None and not hasattr(local.parameter, "tensor_model_parallel"):
            # What GateUp and QueryGroups pack is cut along the rows of the flat parameter.
            dim = axis if isinstance(local.mapped.operation, Copy) else 0
            set_tensor_model_parallel_attributes(local.parameter, True, dim, 1)
        if local.mapped.is_expert:
            local.parameter.allreduce = False  # type: ignore[attr-defined]


def load_parameters(
    chunk: nn.Module, model: ModelConfig, read: Callable[[str, tuple[int, ...]], Tensor]
) -> None:
    """Fill a chunk from tensors in MiniMax's names.

    Args:
        read: gives the whole tensor of a name and shape.
    """
    with torch.no_grad():
        for local in local_parameters(chunk, model):
            tensors = [read(name, shape) for name, shape in local.mapped.theirs]
            packed = local.mapped.operation.pack(tensors, model)
            local.parameter.copy_(local.part(packed))
