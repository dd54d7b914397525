"""MiniMax-M1's published sizes, and ours at that size without any weights."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch
import yaml

from megatron_m1.checkpoint.mapping import mapped_parameters
from megatron_m1.model.build import build_chunks
from megatron_m1.model.config import LIGHTNING, SOFTMAX, ModelConfig
from megatron_m1.model.parameters import local_parameters
from megatron_m1.model.transformer_config import transformer_config
from parallel.layout import Layout

PARAMETERS = 456_089_655_296
CHECKPOINT_TENSORS = 8_243
CHECKPOINT_BYTES = 912_210_767_872
SOFTMAX_LAYERS = list(range(7, 80, 8))


@pytest.fixture(scope="module")
def m1() -> ModelConfig:
    path = Path(__file__).resolve().parents[2] / "conf/model/m1_456b.yaml"
    return ModelConfig(**yaml.safe_load(path.read_text()))


def test_config_knows_its_size(m1: ModelConfig) -> None:
    assert m1.num_params() == PARAMETERS
    assert m1.active_params() == pytest.approx(45.94e9, abs=5e6)
    assert m1.attention_params(LIGHTNING) == pytest.approx(251.67e6, rel=1e-4)
    assert m1.attention_params(SOFTMAX) == pytest.approx(113.25e6, rel=1e-4)
    moe = m1.num_experts * m1.expert_params() + m1.router_params()
    assert moe == pytest.approx(5_436.0e6, rel=1e-4)


def test_softmax_layers(m1: ModelConfig) -> None:
    assert [n for n, kind in enumerate(m1.layer_kinds) if kind == SOFTMAX] == SOFTMAX_LAYERS
    assert m1.residual_alpha == pytest.approx(3.5565588200778455, abs=1e-12)


def test_mapping_covers_the_released_checkpoint(m1: ModelConfig) -> None:
    """Weights are stored in two bytes, the routers' in four."""
    theirs = [tensor for mapped in mapped_parameters(m1).values() for tensor in mapped.theirs]
    assert len(dict(theirs)) == len(theirs) == CHECKPOINT_TENSORS
    size = sum(prod(shape) * (4 if ".gate." in name else 2) for name, shape in theirs)
    assert size == CHECKPOINT_BYTES


def test_model_without_weights(m1: ModelConfig, single_process: Layout) -> None:
    config = transformer_config(m1, single_process)
    (chunk,) = build_chunks(m1, config, seed=None, device=torch.device("meta"))
    found = list(local_parameters(chunk, m1))
    assert all(local.parameter.is_meta for local in found)
    assert sum(local.parameter.numel() for local in found) == PARAMETERS
    assert {local.mapped.ours for local in found} == mapped_parameters(m1).keys()
