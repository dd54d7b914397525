"""Checkpoints that hold weights alone, as an import leaves them, and the models that they fit."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from megatron_m1.checkpoint.folders import CONFIG
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


def is_imported(path: Path) -> bool:
    """Whether a checkpoint holds weights alone.

    Raises:
        InputError: its configuration cannot be read.
    """
    try:
        return IMPORTED in json.loads((path / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path / CONFIG} cannot be read as a configuration: {error}") from error


def model_differences(left: ModelConfig, right: ModelConfig) -> dict[str, str]:
    """The keys in which two models have other weights, or compute something else from the same;
    each with both values."""
    keys = [field.name for field in fields(ModelConfig) if field.name not in _TRAINING_ONLY]
    return {
        key: f"model.{key}={getattr(left, key)} here, {getattr(right, key)} there"
        for key in (*keys, "layer_kinds")
        if getattr(left, key) != getattr(right, key)
    }
