"""How each format says in its config.json what a model is.

Sources: the released config.json of MiniMax-M1; ``MiniMaxConfig`` of transformers 4.57 and 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_m1.config_reading import read_section
from megatron_m1.conversion.foreign_config import Described, HuggingFaceWords
from megatron_m1.model.config import LIGHTNING, SOFTMAX, ModelConfig

REMOTE = HuggingFaceWords(
    layers="attn_type_list",
    kinds={LIGHTNING: 0, SOFTMAX: 1},
    scale="layernorm_{part}_{factor}",
    parts=("full_attention", "linear_attention", "mlp"),
    must={
        "hidden_act": ("silu",),
        "postnorm": (True,),
        "shared_intermediate_size": (0, [0], None),
        "sliding_window": (None,),
        "tie_word_embeddings": (False,),
        "quantization_config": (None,),
    },
    # Without it MiniMax's code adds the residual before the norm.
    needed=("postnorm",),
)
NATIVE = HuggingFaceWords(
    layers="layer_types",
    kinds={LIGHTNING: "linear_attention", SOFTMAX: "full_attention"},
    scale="{part}_{factor}_factor",
    parts=("full_attn", "linear_attn", "mlp"),
    must={
        "hidden_act": ("silu",),
        "sliding_window": (None,),
        "tie_word_embeddings": (False,),
        "quantization_config": (None,),
    },
    rotates_whole_heads=True,
)


@dataclass(frozen=True)
class OwnWords:
    """Our configuration under the key ``model``."""

    def read(self, values: Mapping[str, Any], problems: list[str]) -> Described:
        model = read_section(ModelConfig, values.get("model"), "model", problems)
        problems += model.problems() if not problems else []
        return Described(model, values.get("dtype"))

    def write(self, model: ModelConfig, max_length: int) -> dict[str, Any]:
        return {"model": asdict(model), "max_position_embeddings": max_length}

    def unsaid(self, model: ModelConfig) -> list[str]:
        return []


OWN = OwnWords()
