"""The formats that weights come in and go out to: for each a table of names and its configuration.

A format is a ``Family``: which tensors hold each of our parameters (a table of invertible rules, as
in ``mapping``), and how its config.json is read and written (``words``). Conversion goes
from the tensors of one family through our parameters to those of another, so a new family is a new
table here and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_m1.checkpoint.mapping import (
    MINIMAX,
    Copy,
    MappedParameter,
    QueryGroups,
    Rule,
    mapped_parameters,
)
from megatron_m1.conversion.foreign_config import Words
from megatron_m1.conversion.words import NATIVE, OWN, REMOTE
from megatron_m1.model.config import ModelConfig

_EXPERT = ".experts.{expert}."


@dataclass(frozen=True)
class QueryGroupsInHalves(QueryGroups):
    """``QueryGroups`` of a class that pairs dimension i of a head with i + D/2 where MiniMax pairs
    i with i + rotary_dim/2: the rows of q and k stand in another order within each head.

    With frequency 0 for the pairs that MiniMax does not rotate, both give the same q.k.
    """

    def pack(self, tensors: Sequence[Tensor], model: ModelConfig) -> Tensor:
        back = rows_in_halves(model).argsort()
        return super().pack([*(_reorder(t, back, model) for t in tensors[:2]), tensors[2]], model)

    def unpack(self, packed: Tensor, model: ModelConfig) -> list[Tensor]:
        order = rows_in_halves(model)
        query, key, value = super().unpack(packed, model)
        return [_reorder(query, order, model), _reorder(key, order, model), value]


def rows_in_halves(model: ModelConfig) -> Tensor:
    """For each dimension of a head in the other order, the dimension of MiniMax's."""
    half, rest = model.rotary_dim // 2, (model.head_dim - model.rotary_dim) // 2
    first, second, third, fourth = torch.arange(model.head_dim).split([half, half, rest, rest])
    return torch.cat([first, third, second, fourth])


def _reorder(rows: Tensor, order: Tensor, model: ModelConfig) -> Tensor:
    heads = rows.view(-1, model.head_dim, model.hidden_size)
    return heads[:, order].reshape(rows.shape)


def _ours(rule: Rule) -> Rule:
    return replace(rule, theirs=((rule.ours, rule.shape),), operation=Copy(None))


def _experts_stacked(rule: Rule) -> Rule:
    """Megatron's distributed checkpoint: all experts of a layer under one key."""
    if _EXPERT not in rule.ours:
        return _ours(rule)
    key = rule.ours.replace(_EXPERT, ".experts.experts.")
    return replace(rule, theirs=((key, f"E {rule.shape}"),), operation=Copy(None))


def _in_memory(rule: Rule) -> Rule:
    """transformers 5 stacks the experts, gate above up, and calls the block ``mlp``."""
    name = rule.theirs[0][0].replace(".block_sparse_moe.", ".mlp.")
    if _EXPERT in rule.ours:
        prefix, _, matrix = name.partition(_EXPERT)
        part = "down_proj" if matrix.startswith("w2") else "gate_up_proj"
        theirs = ((f"{prefix}.experts.{part}", f"E {rule.shape}"),)
        return replace(rule, theirs=theirs, operation=Copy(None))
    return replace(rule, theirs=((name, rule.theirs[0][1]), *rule.theirs[1:]))


def _in_halves(rule: Rule) -> Rule:
    is_grouped = isinstance(rule.operation, QueryGroups)
    return replace(rule, operation=QueryGroupsInHalves()) if is_grouped else rule


@dataclass(frozen=True)
class Family:
    """A format of weights.

    Attributes:
        name: what ``--format`` calls it.
        architectures: what ``architectures`` in config.json may say; exports write the first.
        model_type: what exports write there.
        rules: the table for models that this format says with its own words.
        has_decays: whether a lightning layer also stores its decay (see ``decays``).
        in_halves: the table for models that rotate a part of each head, where the format's classes
            rotate whole heads; None where they can do as ours.
    """

    name: str
    architectures: tuple[str, ...]
    model_type: str
    words: Words
    rules: tuple[Rule, ...]
    has_decays: bool = False
    in_halves: tuple[Rule, ...] | None = None

    def parameters(self, model: ModelConfig) -> dict[str, MappedParameter]:
        """Every parameter of the model by our name, with the tensors that hold it here."""
        is_partial = model.rotary_dim < model.head_dim
        rules = self.in_halves if self.in_halves and is_partial else self.rules
        return mapped_parameters(model, rules)


IN_MEMORY = tuple(map(_in_memory, MINIMAX))
DISTRIBUTED = tuple(map(_experts_stacked, MINIMAX))

MINIMAX_M1 = Family("minimax_m1", ("MiniMaxM1ForCausalLM",), "minimax_m1", REMOTE, MINIMAX)
FAMILIES = (
    MINIMAX_M1,
    Family("minimax_text_01", ("MiniMaxText01ForCausalLM",), "minimax_text_01", REMOTE, MINIMAX),
    Family(
        "transformers",
        ("MiniMaxForCausalLM",),
        "minimax",
        NATIVE,
        MINIMAX,
        has_decays=True,
        in_halves=tuple(map(_in_halves, MINIMAX)),
    ),
    Family(
        "transformers_memory",
        ("MiniMaxForCausalLM",),
        "minimax",
        NATIVE,
        IN_MEMORY,
        has_decays=True,
        in_halves=tuple(map(_in_halves, IN_MEMORY)),
    ),
    Family("megatron_m1", ("MegatronM1",), "megatron_m1", OWN, tuple(map(_ours, MINIMAX))),
)
BY_NAME = {family.name: family for family in FAMILIES}
