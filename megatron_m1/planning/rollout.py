"""How long decoding takes: the weights, states and keys that a step must read, or its operations.

A group of GPUs holds one copy of the weights and decodes a batch of sequences together. The group
is the fewest nodes that hold weights and one sequence; the state of training is meant to be
elsewhere meanwhile. Where the heads divide by the GPUs, every layer is divided over all of them;
else over the GPUs of a node, and the layers over the nodes, of which some may have one more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_m1.errors import ConfigError
from megatron_m1.model.config import ModelConfig
from megatron_m1.planning import flops
from megatron_m1.planning.communication import Group
from megatron_m1.planning.config import Plan
from megatron_m1.planning.memory import GIB
from megatron_m1.planning.state import kv_elements, lightning_state_bytes, state_bytes

_BF16, _FP32 = 2, 4


@dataclass(frozen=True)
class Rollout:
    """A batch that a group of GPUs decodes together.

    Attributes:
        gpus: of the group.
        sequences: that fit at their full length.
        step_seconds: for one more token of each of the batch, at the mean length.
        memory: bytes on the fullest GPU, by what takes them, when the batch has its full length.
    """

    gpus: int
    sequences: int
    batch: int
    step_seconds: float
    memory: dict[str, float]

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.step_seconds


def rollout(model: ModelConfig, plan: Plan, wanted: int, prompt: int, response: int) -> Rollout:
    """Decoding of ``wanted`` sequences, as many at a time as fit.

    Raises:
        ConfigError: the cluster is too small for the weights and one sequence.
    """
    length = prompt + response
    gpus = _group(model, plan, length)
    if gpus is None:
        raise ConfigError(
            [
                f"plan.nodes={plan.nodes} are too few to generate: the weights take "
                f"{_weight_bytes(model) / GIB:.0f} GiB and a sequence of {length} tokens "
                f"{state_bytes(model, length) / GIB:.1f} GiB "
                f"({kv_elements(model)} numbers a token and the lightning states)"
            ]
        )
    fit = _sequences(model, plan, gpus, length)
    # As many rounds as needed, all of one size.
    batch = math.ceil(wanted / math.ceil(wanted / fit))
    return _rollout(model, plan, gpus, batch, prompt, response)


def fullest(model: ModelConfig, plan: Plan, prompt: int, response: int) -> Rollout | None:
    """Decoding of as many sequences as the smallest group holds; None where none holds any."""
    gpus = _group(model, plan, prompt + response)
    if gpus is None:
        return None
    fit = _sequences(model, plan, gpus, prompt + response)
    return _rollout(model, plan, gpus, fit, prompt, response)


def _rollout(
    model: ModelConfig, plan: Plan, gpus: int, batch: int, prompt: int, response: int
) -> Rollout:
    length = prompt + response
    states, share = lightning_state_bytes(model), _share(model, plan, gpus)
    memory = {
        "weights": share * _weight_bytes(model),
        "keys and values": share * batch * (state_bytes(model, length) - states),
        "lightning states": share * batch * states,
    }
    seconds = decode_seconds(model, plan, gpus, batch, prompt + response // 2)
    return Rollout(gpus, _sequences(model, plan, gpus, length), batch, seconds, memory)


def decode_seconds(model: ModelConfig, plan: Plan, gpus: int, batch: int, context: int) -> float:
    """One step: memory or products, whichever is longer, and two all-reduces a layer."""
    hit = 1 - (1 - model.router_topk / model.num_experts) ** batch
    experts = model.num_layers * model.num_experts * model.expert_params()
    read = _weight_bytes(model) - (1 - hit) * _BF16 * experts
    # The states are written again; of the embedding only some rows are read.
    read += batch * (state_bytes(model, context) + lightning_state_bytes(model))
    read -= _BF16 * model.vocab_size * model.hidden_size
    share = _share(model, plan, gpus)
    bandwidth = plan.hbm_tb_per_s * 1e12 * plan.efficiency.memory / share
    products = batch * sum(flops.decode(model, context).values())
    peak = plan.bf16_tflops * 1e12 * plan.efficiency.matmul / share
    reduced = Group(gpus, 1).ring(plan, batch * model.hidden_size * _BF16)
    return max(read / bandwidth, products / peak) + 4 * model.num_layers * reduced


def _weight_bytes(model: ModelConfig) -> float:
    head = model.vocab_size * model.hidden_size * model.fp32_lm_head
    return _BF16 * model.num_params() + (_FP32 - _BF16) * head


def _group(model: ModelConfig, plan: Plan, length: int) -> int | None:
    """GPUs of the smallest group that holds the weights and a sequence."""
    groups = (nodes * plan.gpus_per_node for nodes in range(1, plan.nodes + 1))
    return next((gpus for gpus in groups if _sequences(model, plan, gpus, length)), None)


def _sequences(model: ModelConfig, plan: Plan, gpus: int, length: int) -> int:
    """How many of this length fit beside the weights."""
    room = plan.usable_gb * GIB / _share(model, plan, gpus) - _weight_bytes(model)
    return max(0, int(room / state_bytes(model, length)))


def _share(model: ModelConfig, plan: Plan, gpus: int) -> float:
    """The part of the model that the fullest GPU of a group holds."""
    if model.num_attention_heads % gpus == 0:
        return 1 / gpus
    most = math.ceil(model.num_layers / (gpus // plan.gpus_per_node))
    return most / model.num_layers / plan.gpus_per_node
