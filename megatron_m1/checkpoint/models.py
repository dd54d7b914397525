"""What the configuration of a checkpoint says it is of, and what tells two models apart."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_m1.checkpoint.folders import CONFIG
from megatron_m1.config_reading import read_section
from megatron_m1.errors import InputError
from megatron_m1.model.config import ModelConfig

IMPORTED = "imported"
"""The key of config.json under which an import says where the weights came from."""

# Neither the weights nor their logits depend on these; the layers' kinds are compared in the
# pattern's place.
_TRAINING_ONLY = (
    *("name", "init", "layer_pattern", "aux_loss_coef", "z_loss_coef"),
    *("capacity_factor", "drop_policy", "capacity_scope", "fp32_lm_head"),
)


def saved_config(path: Path) -> dict[str, Any]:
    """The configuration that a checkpoint was written with.

    Raises:
        InputError: it cannot be read.
    """
    try:
        found = json.loads((path / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path / CONFIG} cannot be read as a configuration: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path / CONFIG} holds {type(found).__name__}, not a configuration")
    return found


def saved_model(path: Path) -> ModelConfig:
    """The sizes of the model in a checkpoint.

    Raises:
        InputError: its configuration does not say them.
    """
    problems: list[str] = []
    model = read_section(ModelConfig, saved_config(path).get("model"), "model", problems)
    if problems := problems or model.problems():
        raise InputError(f"{path / CONFIG} does not describe a model: {', '.join(problems)}")
    return model


def is_imported(path: Path) -> bool:
    """Whether a checkpoint holds weights alone, as an import leaves them."""
    return IMPORTED in saved_config(path)


def model_differences(
    left: ModelConfig, right: ModelConfig, also: Collection[str] = ()
) -> dict[str, str]:
    """The keys in which two models have other weights, or compute something else from the same;
    each with both values.

    Args:
        also: keys to compare that only training depends on.
    """
    ignored = set(_TRAINING_ONLY) - set(also)
    keys = [field.name for field in fields(ModelConfig) if field.name not in ignored]
    return {
        key: f"model.{key}={getattr(left, key)} here, {getattr(right, key)} there"
        for key in (*keys, "layer_kinds")
        if getattr(left, key) != getattr(right, key)
    }
