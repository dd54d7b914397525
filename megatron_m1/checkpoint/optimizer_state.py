"""The optimizer's part of a checkpoint: Megatron's, with what it misses for torch's AdamW.

Transformer Engine's and Apex's AdamW count steps in their parameter groups; torch's counts them in
the state of each parameter, where Megatron 0.16.1 trips over them while it loads.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

# Each moment in the shape of its parameter. Megatron's default for the distributed optimizer cannot
# be written ("flattened_range is not supported").
LAYOUT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    # A prefix for each of a rank's optimizers would depend on what the rank holds.
    "chained_optim_avoid_prefix": True,
}
_HYPERPARAMETERS = ("betas", "eps", "weight_decay")


def metadata() -> dict[str, Any]:
    """What Megatron's ``sharded_state_dict`` methods ask for."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {**LAYOUT, "dp_cp_group": group}


def sharded_optimizer(
    optimizer: MegatronOptimizer, model: dict[str, Any], is_loading: bool
) -> dict[str, Any]:
    """Moments and FP32 weights in the coordinates of the whole model.

    Args:
        model: the sharded state of the model chunks, as ``model0``, ``model1``, ...
    """
    if is_loading:
        _fill_moments(optimizer)
    # Megatron looks its parameters up in one model's dictionary, or in model0, model1, ...
    return optimizer.sharded_state_dict(
        model["model0"] if len(model) == 1 else model, is_loading=is_loading, metadata=metadata()
    )


def load_optimizer(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> None:
    """Take over what was read, but for the hyperparameters: those are the configuration's."""
    asked = [{key: group[key] for key in _HYPERPARAMETERS} for group in optimizer.param_groups]
    parts = optimizer.chained_optimizers
    for index, part in enumerate(parts):
        own = state[index] if len(parts) > 1 else state
        if isinstance(part, DistributedOptimizer):
            tensors = own.pop("param_state")
            del own["param_state_sharding_type"]
            part.load_state_dict(own)
            _load_tensors(part, tensors)
        else:
            part.load_state_dict(own)
    for group, values in zip(optimizer.param_groups, asked, strict=True):
        group.update(values)


def _load_tensors(part: DistributedOptimizer, tensors: dict[int, Any]) -> None:
    """distrib_optimizer.py:939 wants a tensor for each entry of the state and finds none for the
    steps; and line 823 gives all parameters one and the same tensor to count in."""
    states = [state for state in part.optimizer.state.values() if "step" in state]
    steps = [state.pop("step") for state in states]
    part.load_parameter_state_from_fully_reshardable(tensors)
    for state, step in zip(states, steps, strict=True):
        state["step"] = step.clone()


def _fill_moments(optimizer: MegatronOptimizer) -> None:
    """Megatron asks the optimizer for what it is about to load, but torch's AdamW has moments only
    after its first step."""
    for part in optimizer.chained_optimizers:
        if not isinstance(part.optimizer, torch.optim.AdamW):
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                part.optimizer.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
