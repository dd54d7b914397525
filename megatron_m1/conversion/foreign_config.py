"""config.json in Hugging Face's form into our sizes and back, in the words of a format (``words``).

Reading is strict: a key that would change the mathematics and is not understood here is refused by
name, since a model that is read almost right trains and speaks almost right.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from megatron_m1.conversion.rope import KEYS as ROPE_KEYS
from megatron_m1.conversion.rope import (
    Rope,
    problems_partly,
    problems_whole,
    read_rope,
    written_partly,
    written_whole,
)
from megatron_m1.model.config import LIGHTNING, ModelConfig

# Their key: ours.
_SIZES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "router_topk",
}
# In a scale where a balanced router has loss topk; in ours it has 1.
_AUX_LOSS = "router_aux_loss_coef"
# Say nothing about the weights or what they compute.
WITHOUT_EFFECT = (
    *("architectures", "model_type", "auto_map", "transformers_version", "_name_or_path"),
    *("torch_dtype", "dtype", "use_cache", "initializer_range", "max_position_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "tokenizer_class"),
    *("attention_dropout", "router_jitter_noise", _AUX_LOSS, "output_router_logits"),
    *("output_attentions", "output_hidden_states", "return_dict", "block_size", "shared_moe_mode"),
    *("attn_implementation", "_attn_implementation", "id2label", "label2id", "problem_type"),
)
_UNWRITTEN = ("quantization_config",)
BLOCK_SIZE = 256
_LIGHTNING_NORM_EPS = 1e-6  # fixed in MiniMax's code and in transformers


@dataclass(frozen=True)
class Described:
    """What a config.json says.

    Attributes:
        dtype: the name of the weights' type, such as bfloat16; None where it is not said.
        block_size: tokens of a block of lightning attention, which the stored decays depend on.
    """

    model: ModelConfig
    dtype: str | None
    block_size: int = BLOCK_SIZE


class Words(Protocol):
    """How one format says in config.json what our configuration says."""

    def read(self, values: Mapping[str, Any], problems: list[str]) -> Described:
        """The model that ``values`` describe; what is wrong with them goes to ``problems``."""
        ...

    def write(self, model: ModelConfig, max_length: int) -> dict[str, Any]:
        """The keys that say what the model is.

        Args:
            max_length: the longest sequence that other programs should take.
        """
        ...

    def unsaid(self, model: ModelConfig) -> list[str]:
        """What the model does that the format has no words for."""
        ...


@dataclass(frozen=True)
class HuggingFaceWords:
    """Those of MiniMax's own code and of transformers, which differ in a few keys.

    Attributes:
        layers: the key with the kind of each layer.
        kinds: what it calls them.
        scale: the key of a DeepNorm factor of a part, with {part} and {factor}.
        parts: the three parts of a layer.
        must: keys with the only values that we can take; absent means the first of them, unless
            the key is in ``needed``.
        rotates_whole_heads: the classes have no other rotation.
    """

    layers: str
    kinds: Mapping[str, Any]
    scale: str
    parts: tuple[str, ...]
    must: Mapping[str, tuple[Any, ...]]
    needed: Collection[str] = ()
    rotates_whole_heads: bool = False

    def read(self, values: Mapping[str, Any], problems: list[str]) -> Described:
        values = _with_head_dim(values)
        found: dict[str, Any] = {"name": str(values.get("model_type", "imported"))}
        for theirs, ours in _SIZES.items():
            found[ours] = _whole_number(values, theirs, problems)
        found["norm_eps"] = _number(values, "rms_norm_eps", problems)
        found["layer_pattern"] = self._pattern(values, found["num_layers"], problems)
        found["deepnorm_alpha"] = self._factor(values, "alpha", problems)
        found["deepnorm_beta"] = self._factor(values, "beta", problems)
        if _AUX_LOSS in values:
            found["aux_loss_coef"] = _number(values, _AUX_LOSS, problems) * found["router_topk"]
        self._check_fixed(values, problems)
        rope = read_rope(values)
        found["rope_theta"] = _number({"rope_theta": rope.theta}, "rope_theta", problems)
        rotary = {"rotary_dim": found["head_dim"] if rope.rotary_dim is None else rope.rotary_dim}
        found["rotary_dim"] = _whole_number(rotary, "rotary_dim", problems)
        block = _whole_number({"block_size": BLOCK_SIZE, **values}, "block_size", problems)
        if problems:
            return Described(ModelConfig(), None)
        model = _with_usual_alpha(ModelConfig(**found))
        problems += model.problems() or self._rope_problems(rope, model)
        return Described(model, values.get("dtype") or values.get("torch_dtype"), block)

    def _rope_problems(self, rope: Rope, model: ModelConfig) -> list[str]:
        if self.rotates_whole_heads:
            return problems_whole(rope, model)
        return problems_partly(rope)

    def write(self, model: ModelConfig, max_length: int) -> dict[str, Any]:
        sizes = {theirs: getattr(model, ours) for theirs, ours in _SIZES.items()}
        factors = {"alpha": model.residual_alpha, "beta": model.deepnorm_beta}
        is_whole = self.rotates_whole_heads
        return {
            **sizes,
            self.layers: [self.kinds[kind] for kind in model.layer_kinds],
            **{
                self.scale.format(part=part, factor=factor): value
                for part in self.parts
                for factor, value in factors.items()
            },
            **{key: values[0] for key, values in self.must.items() if key not in _UNWRITTEN},
            **(written_whole(model, max_length) if is_whole else written_partly(model)),
            "rms_norm_eps": model.norm_eps,
            "max_position_embeddings": max_length,
            _AUX_LOSS: model.aux_loss_coef / model.router_topk,
        }

    def unsaid(self, model: ModelConfig) -> list[str]:
        if model.lightning_norm_eps == _LIGHTNING_NORM_EPS:
            return []
        return [
            f"model.lightning_norm_eps={model.lightning_norm_eps}, but the format's classes have "
            f"{_LIGHTNING_NORM_EPS}"
        ]

    def _pattern(self, values: Mapping[str, Any], num_layers: int, problems: list[str]) -> str:
        """The shortest pattern of letters that the list of layers repeats."""
        names = values.get(self.layers)
        letters = {name: letter for letter, name in self.kinds.items()}
        if not isinstance(names, list) or any(
            isinstance(name, list | dict) or name not in letters for name in names
        ):
            problems.append(
                f"{self.layers}={names} is not a list of {' and '.join(map(str, letters))}"
            )
            return LIGHTNING
        if len(names) != num_layers:
            problems.append(
                f"{self.layers} names {len(names)} layers, num_hidden_layers={num_layers}"
            )
        kinds = "".join(letters[name] for name in names)
        lengths = range(1, len(kinds) + 1)
        return next(
            (kinds[:n] for n in lengths if kinds == (kinds[:n] * len(kinds))[: len(kinds)]), ""
        )

    def _factor(self, values: Mapping[str, Any], factor: str, problems: list[str]) -> float:
        keys = [self.scale.format(part=part, factor=factor) for part in self.parts]
        found = [_number(values, key, problems) for key in keys]
        if len(set(found)) > 1:
            said = ", ".join(f"{key}={value}" for key, value in zip(keys, found, strict=True))
            problems.append(f"{said} differ, but this project's model has one {factor} for all")
        return found[0]

    def _check_fixed(self, values: Mapping[str, Any], problems: list[str]) -> None:
        for key, allowed in self.must.items():
            if key not in values and key in self.needed:
                problems.append(f"{key} is missing; this project's model has {allowed[0]!r}")
            elif values.get(key, allowed[0]) not in allowed:
                problems.append(
                    f"{key}={values[key]!r} is not what this project's model does: {allowed[0]!r}"
                )
        scales = {
            self.scale.format(part=part, factor=factor)
            for part in self.parts
            for factor in ("alpha", "beta")
        }
        known = {
            *_SIZES,
            *scales,
            *self.must,
            *WITHOUT_EFFECT,
            *ROPE_KEYS,
            self.layers,
            "rms_norm_eps",
        }
        problems += [
            f"{key}={values[key]!r} is not known and could change what the model computes; "
            f"--ignore-config-keys {key} if it does not"
            for key in values
            if key not in known
        ]


def _with_head_dim(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where it is not said, the heads share the width of the model."""
    width, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if values.get("head_dim") is not None or not (type(width) is type(heads) is int and heads):
        return values
    return {**values, "head_dim": width // heads}


def _with_usual_alpha(model: ModelConfig) -> ModelConfig:
    """None where alpha is (2N)^0.25 but for rounding, as our configurations have it."""
    usual = replace(model, deepnorm_alpha=None)
    return usual if math.isclose(model.residual_alpha, usual.residual_alpha) else model


def _whole_number(values: Mapping[str, Any], key: str, problems: list[str]) -> int:
    value = values.get(key)
    if type(value) is not int:
        problems.append(
            f"{key}={value!r} is not a whole number" if key in values else f"{key} is missing"
        )
        return 1
    return value


def _number(values: Mapping[str, Any], key: str, problems: list[str]) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        problems.append(
            f"{key}={value!r} is not a number" if key in values else f"{key} is missing"
        )
        return 1.0
    return float(value)
