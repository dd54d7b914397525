"""Rotation in config.json: part of each head or all of it, in the words of several versions.

MiniMax rotates the first ``rotary_dim`` dimensions of a head, i with i + rotary_dim/2. The class of
transformers rotates all D, i with i + D/2, and takes no notice of ``rotary_dim`` and
``partial_rotary_factor``. It computes a partial rotation right when q and k stand in another order
(``families.QueryGroupsInHalves``) and each of its D/2 frequencies is given: ``longrope``, in
transformers 4 and 5, takes a list of divisors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_m1.model.config import ModelConfig

KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "rotary_dim", "partial_rotary_factor")
_NEVER = 1e30
"""Divides a frequency to nothing: no angle at any position."""


@dataclass(frozen=True)
class Rope:
    """What a config.json says of rotation.

    Attributes:
        rotary_dim: dimensions of a head that it asks to rotate; None where it does not say.
        divisors: of the frequencies, for ``longrope``; None where lengths differ in them or
            attention is scaled too.
    """

    theta: Any
    kind: str
    rotary_dim: Any
    divisors: Any


def read_rope(values: Mapping[str, Any]) -> Rope:
    """The rotation, whichever version's keys say it; the values are not checked yet."""
    said = values.get("rope_parameters") or values.get("rope_scaling") or {}
    said = said if isinstance(said, dict) else {"rope_type": said}
    rotary, head_dim = values.get("rotary_dim"), values.get("head_dim")
    share = said.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if rotary is None and isinstance(share, int | float) and isinstance(head_dim, int):
        rotary = round(head_dim * share)
    kind = said.get("rope_type") or said.get("type") or "default"
    theta = said.get("rope_theta", values.get("rope_theta"))
    # Without an attention_factor transformers makes one of the factor.
    scale = said.get("attention_factor", said.get("factor"))
    is_plain = scale == 1 and said.get("short_factor") == said.get("long_factor")
    return Rope(theta, str(kind), rotary, said.get("long_factor") if is_plain else None)


def written_partly(model: ModelConfig) -> dict[str, Any]:
    """The keys for MiniMax's own code."""
    return {"rope_theta": model.rope_theta, "rotary_dim": model.rotary_dim}


def written_whole(model: ModelConfig, max_length: int) -> dict[str, Any]:
    """The keys for the class of transformers: version 4 reads ``rope_theta`` and ``rope_scaling``,
    5 ``rope_parameters``."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rotary_dim == model.head_dim:
        return {"rope_theta": model.rope_theta, "rope_parameters": rope}
    divisors = frequency_divisors(model)
    rope |= {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": max_length,
        "short_factor": divisors,
        "long_factor": divisors,
    }
    return {**written_partly(model), "rope_scaling": rope, "rope_parameters": rope}


def problems_partly(rope: Rope) -> list[str]:
    """What MiniMax's own code would not do."""
    if rope.kind == "default":
        return []
    return [f"rope_scaling of type {rope.kind} is not known for this architecture"]


def problems_whole(rope: Rope, model: ModelConfig) -> list[str]:
    """What the class of transformers would not do, or do otherwise than the file seems to say."""
    is_partial = model.rotary_dim != model.head_dim
    if rope.kind == "default" and is_partial:
        return [
            f"it asks to rotate {model.rotary_dim} of a head's {model.head_dim} dimensions, but "
            "transformers' class silently rotates them all: weights trained by it need "
            f"rotary_dim={model.head_dim}, others are in MiniMax's own format (architectures "
            "MiniMaxM1ForCausalLM)"
        ]
    if rope.kind == "default" or (rope.kind == "longrope" and _are_ours(rope.divisors, model)):
        return []
    return [
        f"rope_type={rope.kind} is not known: default is, and longrope with the divisors that this "
        "converter writes for a partial rotation"
    ]


def frequency_divisors(model: ModelConfig) -> list[float]:
    """What each frequency of a whole rotation, base^(-2i / D), is divided by: the first
    rotary_dim / 2 become MiniMax's base^(-2i / rotary_dim), the others stand still."""
    half, rotated = model.head_dim // 2, model.rotary_dim // 2
    exponents = [2 * i / model.rotary_dim - 2 * i / model.head_dim for i in range(rotated)]
    return [model.rope_theta**power for power in exponents] + [_NEVER] * (half - rotated)


def _are_ours(divisors: Any, model: ModelConfig) -> bool:
    expected = frequency_divisors(model)
    return (
        model.rotary_dim != model.head_dim
        and isinstance(divisors, list)
        and len(divisors) == len(expected)
        and all(
            isinstance(a, int | float) and math.isclose(a, b, rel_tol=1e-6)
            for a, b in zip(divisors, expected, strict=True)
        )
    )
