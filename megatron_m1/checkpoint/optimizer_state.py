"""The optimizer's part of a checkpoint: master weights and moments, each in its parameter's shape.

Megatron's distributed optimizer cuts them into flat shares over the data-parallel group. Megatron
0.16.1 puts them together as whole buffers, several at a time (7 to 9 FP32 copies of a process's
weights were seen). Here each parameter has one owner in its group: the shares go to the owner when
saving and come from it when loading, one parameter at a time, so a process holds three FP32 copies
of its weights divided by the size of the group, and all processes of the group write and read.

Transformer Engine's and Apex's AdamW count steps in their parameter groups; torch's counts them in
the state of each parameter, where Megatron 0.16.1 trips over them while it loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

# What the models' ``sharded_state_dict`` and the chained optimizers ask of a checkpoint's form.
LAYOUT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # A prefix for each of a rank's optimizers would depend on what the rank holds.
    "chained_optim_avoid_prefix": True,
}
_MOMENTS = ("param", "exp_avg", "exp_avg_sq")
_HYPERPARAMETERS = ("betas", "eps", "weight_decay")


def metadata() -> dict[str, Any]:
    """What Megatron's ``sharded_state_dict`` methods ask for."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {**LAYOUT, "dp_cp_group": group}


def sharded_optimizer(
    optimizer: MegatronOptimizer, model: dict[str, Any], is_loading: bool
) -> dict[Any, Any]:
    """Moments and FP32 weights in the coordinates of the whole model, on the host.

    Args:
        model: the sharded state of the model chunks, as ``model0``, ``model1``, ...
    """
    _fill_moments(optimizer)
    parts = optimizer.chained_optimizers
    if not all(isinstance(part, DistributedOptimizer) for part in parts):
        # Megatron looks its parameters up in one model's dictionary, or in model0, model1, ...
        return optimizer.sharded_state_dict(
            model["model0"] if len(model) == 1 else model,
            is_loading=is_loading,
            metadata=metadata(),
        )
    if not is_loading and len(parts) > 1:
        optimizer._synchronize_steps()
    tensors, _ = extract_sharded_tensors_and_factories(model)
    described = {sharded.data: sharded for sharded in nested_values(tensors)}
    states = [_sharded_part(part, described, is_loading) for part in parts]
    return states[0] if len(states) == 1 else dict(enumerate(states))


def load_optimizer(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> None:
    """Take over what was read, but for the hyperparameters: those are the configuration's."""
    asked = [{key: group[key] for key in _HYPERPARAMETERS} for group in optimizer.param_groups]
    parts = optimizer.chained_optimizers
    for index, part in enumerate(parts):
        own = state[index] if len(parts) > 1 else state
        if isinstance(part, DistributedOptimizer):
            tensors = own.pop("param_state", {})
            own.pop("param_state_sharding_type", None)
            part.load_state_dict(own)
            _own_steps(part)
            _scatter(part, tensors)
        else:
            part.load_state_dict(own)
    for group, values in zip(optimizer.param_groups, asked, strict=True):
        group.update(values)


@dataclass(frozen=True)
class _Owned:
    """A parameter of a distributed optimizer.

    Attributes:
        index: its number among the optimizer's parameters.
        owner: the rank in the group that holds it whole in a checkpoint.
        share: where this process's flat share lies in it; None where it has none.
    """

    index: int
    parameter: Tensor
    owner: int
    share: slice | None


def _owned(part: DistributedOptimizer) -> Iterator[_Owned]:
    """Every parameter, in the same order and with the same owner on each rank of the group: the one
    with the least to hold so far."""
    loads = [0] * part.data_parallel_group.size()
    index = 0
    for buffer, by_type in zip(part.buffers, part.gbuf_ranges, strict=True):
        shares = {
            parameter: slice(ranges["param"].start, ranges["param"].end)
            for buckets in by_type.values()
            for bucket in buckets
            for parameter, ranges in bucket["param_map"].items()
        }
        for parameter in buffer.param_index_map:
            owner = loads.index(min(loads))
            loads[owner] += parameter.numel()
            yield _Owned(index, parameter, owner, shares.get(parameter))
            index += 1


def _sharded_part(
    part: DistributedOptimizer, described: dict[Any, ShardedBase], is_loading: bool
) -> dict[str, Any]:
    """One optimizer's state: ``param_state`` holds the parameters that this rank owns. Collective
    over the part's group."""
    group = part.data_parallel_group
    tensors: dict[int, dict[str, ShardedBase]] = {}
    for owned in _owned(part):
        weight = described[owned.parameter]
        # The last number tells replicas of the data-parallel group apart: the owner stands for it.
        replica = (*weight.replica_id[:-1], 0)
        if not is_loading and any(replica):
            continue  # written by another group, which holds the same parameter
        is_owner = owned.owner == group.rank()
        for name in _MOMENTS:
            whole = _empty(owned, is_owner) if is_loading else _gather(part, owned, name)
            if whole is not None:
                tensors.setdefault(owned.index, {})[name] = _like(weight, name, whole, replica)
    return {"param_state": tensors} | ({} if is_loading else part.state_dict())


def _like(weight: ShardedBase, name: str, whole: Tensor, replica: tuple[int, ...]) -> ShardedBase:
    """``whole`` where ``weight`` lies in the whole model."""
    changes = {
        "key": f"optimizer.state.{name}.{weight.key}",
        "data": whole,
        "replica_id": replica,
    }
    if not isinstance(weight, ShardedTensorFactory):
        changes["dtype"] = whole.dtype
    return replace(weight, **changes)


def _empty(owned: _Owned, is_owner: bool) -> Tensor | None:
    return torch.empty(owned.parameter.shape, dtype=torch.float32) if is_owner else None


def _gather(part: DistributedOptimizer, owned: _Owned, name: str) -> Tensor | None:
    """The whole tensor on the owner's host; None elsewhere."""
    group = part.data_parallel_group
    whole = torch.zeros(owned.parameter.numel(), dtype=torch.float32, device=owned.parameter.device)
    if owned.share:
        whole[owned.share] = part._get_main_param_and_optimizer_states(owned.parameter)[name]
    if group.size() > 1:
        # As integers: a sum of floats would turn -0.0 into 0.0.
        owner = dist.get_global_rank(group, owned.owner)
        dist.reduce(whole.view(torch.int32), owner, group=group)
    return whole.cpu().view(owned.parameter.shape) if group.rank() == owned.owner else None


@torch.no_grad()
def _scatter(part: DistributedOptimizer, tensors: dict[int, dict[str, Tensor]]) -> None:
    """Give each rank its shares of what the owners read. Collective over the part's group."""
    group = part.data_parallel_group
    for owned in _owned(part):
        read = tensors.pop(owned.index) if owned.owner == group.rank() else {}
        states = part._get_main_param_and_optimizer_states(owned.parameter) if owned.share else {}
        for name in _MOMENTS:
            whole = torch.empty(
                owned.parameter.numel(), dtype=torch.float32, device=owned.parameter.device
            )
            if read:
                whole.copy_(read.pop(name).flatten())
            if group.size() > 1:
                dist.broadcast(whole, dist.get_global_rank(group, owned.owner), group=group)
            if owned.share:
                states[name].copy_(whole[owned.share])


def _own_steps(part: DistributedOptimizer) -> None:
    """distrib_optimizer.py:823 gives all parameters one and the same tensor to count steps in."""
    for state in part.optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].clone()


def _fill_moments(optimizer: MegatronOptimizer) -> None:
    """Megatron asks the optimizer for what it is about to load, and what is saved before a first
    step must load too, but torch's AdamW has moments only after it."""
    for part in optimizer.chained_optimizers:
        if not isinstance(part.optimizer, torch.optim.AdamW) or part.optimizer.state:
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                part.optimizer.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
