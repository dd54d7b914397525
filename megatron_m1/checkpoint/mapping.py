"""Which parameter of ours is which tensor of MiniMax's released checkpoints: a table, written once.

Everything that needs the relation reads it here: the start of the weights, conversion in both
directions, the comparison with transformers. Ours are Megatron's parameter names with the number of
the layer and of the expert in the *whole* model; theirs are the names in MiniMax's safetensors
index (``MiniMaxM1ForCausalLM``, also what transformers writes for ``MiniMaxForCausalLM``). Tables
for other formats are in ``families``.

A parameter has three forms, and an operation goes between them in both directions:

    their tensors  --pack-->  packed  --flat-->  ours (the whole parameter as Megatron keeps it)
                  <-unpack--          <--view--

Dimensions in the table: C width of the model, I query heads x head size, G key/value heads x head
size, Q = I + 2G, F expert FFN width, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_m1.model.config import LIGHTNING, SOFTMAX, ModelConfig


@dataclass(frozen=True)
class Copy:
    """The same tensor on both sides; tensor parallelism cuts ``axis`` (None: each rank has all)."""

    axis: int | None

    def pack(self, tensors: Sequence[Tensor], model: ModelConfig) -> Tensor:
        (tensor,) = tensors
        return tensor

    def unpack(self, packed: Tensor, model: ModelConfig) -> list[Tensor]:
        return [packed]

    def view(self, parameter: Tensor, model: ModelConfig) -> Tensor:
        """A rank's parameter in the shape of its part of ``pack``'s result."""
        return parameter

    def flat(self, packed: Tensor) -> Tensor:
        """The opposite of ``view``."""
        return packed


@dataclass(frozen=True)
class GateUp:
    """[F, C] gate and up matrices side by side: packed [2, F, C], so that each rank's part holds
    its columns of both."""

    axis: int = 1

    def pack(self, tensors: Sequence[Tensor], model: ModelConfig) -> Tensor:
        return torch.stack(list(tensors))

    def unpack(self, packed: Tensor, model: ModelConfig) -> list[Tensor]:
        return list(packed.unbind())

    def view(self, parameter: Tensor, model: ModelConfig) -> Tensor:
        return parameter.view(2, -1, model.hidden_size)

    def flat(self, packed: Tensor) -> Tensor:
        return packed.reshape(-1, packed.shape[-1])


@dataclass(frozen=True)
class QueryGroups:
    """q [I, C], k and v [G, C] as Megatron keeps them: for each key/value head its queries, its
    key, its value; packed [heads, rows of a group, C]."""

    axis: int = 0

    def pack(self, tensors: Sequence[Tensor], model: ModelConfig) -> Tensor:
        groups = [t.view(model.num_query_groups, -1, model.hidden_size) for t in tensors]
        return torch.cat(groups, dim=1)

    def unpack(self, packed: Tensor, model: ModelConfig) -> list[Tensor]:
        queries = model.num_attention_heads // model.num_query_groups * model.head_dim
        parts = packed.split([queries, model.head_dim, model.head_dim], dim=1)
        return [part.reshape(-1, model.hidden_size) for part in parts]

    def view(self, parameter: Tensor, model: ModelConfig) -> Tensor:
        per_group = model.num_attention_heads // model.num_query_groups + 2
        return parameter.view(-1, per_group * model.head_dim, model.hidden_size)

    def flat(self, packed: Tensor) -> Tensor:
        return packed.reshape(-1, packed.shape[-1])


Operation = Copy | GateUp | QueryGroups


@dataclass(frozen=True)
class Rule:
    """One line of the table: our parameter with its whole shape, their tensors with theirs, and
    what lies between.

    Where our name has an expert's number and theirs has none, theirs stacks all experts along its
    first axis, and the operation works on one of them.
    """

    ours: str
    shape: str
    theirs: tuple[tuple[str, str], ...]
    operation: Operation
    kind: str = LIGHTNING + SOFTMAX
    """Kinds of layer in which the rule holds."""


_L = "decoder.layers.{layer}."
_M = "model.layers.{layer}."
_X = "block_sparse_moe.experts.{expert}."
ROUTER = _L + "mlp.router.weight"

MINIMAX = (
    Rule(
        "embedding.word_embeddings.weight", "V C", (("model.embed_tokens.weight", "V C"),), Copy(0)
    ),
    Rule(_L + "input_layernorm.weight", "C", ((_M + "input_layernorm.weight", "C"),), Copy(None)),
    Rule(
        _L + "self_attention.linear_qkv.weight",
        "3I C",
        ((_M + "self_attn.qkv_proj.weight", "3I C"),),
        Copy(0),
        LIGHTNING,
    ),
    Rule(
        _L + "self_attention.linear_gate.weight",
        "I C",
        ((_M + "self_attn.output_gate.weight", "I C"),),
        Copy(0),
        LIGHTNING,
    ),
    Rule(
        _L + "self_attention.norm.weight",
        "I",
        ((_M + "self_attn.norm.weight", "I"),),
        Copy(0),
        LIGHTNING,
    ),
    Rule(
        _L + "self_attention.linear_proj.weight",
        "C I",
        ((_M + "self_attn.out_proj.weight", "C I"),),
        Copy(1),
        LIGHTNING,
    ),
    Rule(
        _L + "self_attention.linear_qkv.weight",
        "Q C",
        (
            (_M + "self_attn.q_proj.weight", "I C"),
            (_M + "self_attn.k_proj.weight", "G C"),
            (_M + "self_attn.v_proj.weight", "G C"),
        ),
        QueryGroups(),
        SOFTMAX,
    ),
    Rule(
        _L + "self_attention.linear_proj.weight",
        "C I",
        ((_M + "self_attn.o_proj.weight", "C I"),),
        Copy(1),
        SOFTMAX,
    ),
    Rule(
        _L + "pre_mlp_layernorm.weight",
        "C",
        ((_M + "post_attention_layernorm.weight", "C"),),
        Copy(None),
    ),
    Rule(ROUTER, "E C", ((_M + "block_sparse_moe.gate.weight", "E C"),), Copy(None)),
    Rule(
        _L + "mlp.experts.{expert}.linear_fc1.weight",
        "2F C",
        ((_M + _X + "w1.weight", "F C"), (_M + _X + "w3.weight", "F C")),
        GateUp(),
    ),
    Rule(
        _L + "mlp.experts.{expert}.linear_fc2.weight",
        "C F",
        ((_M + _X + "w2.weight", "C F"),),
        Copy(1),
    ),
    Rule("decoder.final_layernorm.weight", "C", (("model.norm.weight", "C"),), Copy(None)),
    Rule("output_layer.weight", "V C", (("lm_head.weight", "V C"),), Copy(0)),
)


@dataclass(frozen=True)
class MappedParameter:
    """A rule filled in for one parameter of one model.

    Attributes:
        shape: of the whole parameter.
        theirs: (name, shape) of each tensor on their side.
        expert: the number of the expert that it belongs to; None outside experts.
        slot: the expert's place on the first axis of theirs, where those stack the experts.
    """

    ours: str
    shape: tuple[int, ...]
    theirs: tuple[tuple[str, tuple[int, ...]], ...]
    operation: Operation
    expert: int | None
    slot: int | None

    @property
    def is_expert(self) -> bool:
        return self.expert is not None

    @property
    def is_router(self) -> bool:
        """Whether it stays in FP32, as MiniMax stores it."""
        return self.ours.endswith(ROUTER.removeprefix(_L))


def mapped_parameters(
    model: ModelConfig, rules: Sequence[Rule] = MINIMAX
) -> dict[str, MappedParameter]:
    """Every parameter of the model by our name, in the order of the layers."""
    found: dict[str, MappedParameter] = {}
    for rule, layer in _by_layer(rules, model.num_layers):
        if layer is not None and model.layer_kinds[layer] not in rule.kind:
            continue
        for expert in range(model.num_experts) if "{expert}" in rule.ours else [None]:
            mapped = _fill(rule, layer, expert, model)
            found[mapped.ours] = mapped
    return found


def _by_layer(rules: Sequence[Rule], num_layers: int) -> Iterator[tuple[Rule, int | None]]:
    """Each rule with each layer's number, all rules of a layer before those of the next."""
    inside = [rule for rule in rules if "{layer}" in rule.ours]
    first = rules.index(inside[0])
    yield from ((rule, None) for rule in rules[:first])
    yield from ((rule, layer) for layer in range(num_layers) for rule in inside)
    yield from ((rule, None) for rule in rules[first:] if rule not in inside)


def _fill(rule: Rule, layer: int | None, expert: int | None, model: ModelConfig) -> MappedParameter:
    theirs = tuple(
        (name.format(layer=layer, expert=expert), shape_of(dims, model))
        for name, dims in rule.theirs
    )
    is_stacked = expert is not None and "{expert}" not in rule.theirs[0][0]
    return MappedParameter(
        rule.ours.format(layer=layer, expert=expert),
        shape_of(rule.shape, model),
        theirs,
        rule.operation,
        expert,
        expert if is_stacked else None,
    )


def shape_of(dims: str, model: ModelConfig) -> tuple[int, ...]:
    """Letters of the table, each with an optional factor before it, as sizes of a model."""
    inner = model.num_attention_heads * model.head_dim
    key_value = model.num_query_groups * model.head_dim
    sizes = {
        "C": model.hidden_size,
        "I": inner,
        "G": key_value,
        "Q": inner + 2 * key_value,
        "F": model.ffn_hidden_size,
        "E": model.num_experts,
        "V": model.vocab_size,
    }
    return tuple(int(dim[:-1] or 1) * sizes[dim[-1]] for dim in dims.split())
