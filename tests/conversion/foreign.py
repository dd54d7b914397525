"""Toy models in the formats of others, for the tests of conversion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import MiniMaxForCausalLM

from megatron_m1.conversion.convert import convert
from megatron_m1.conversion.hf_folder import open_folder
from megatron_m1.conversion.jobs import ExportOptions, export_job, import_job
from megatron_m1.conversion.recognition import checkpoint_weights, recognise
from megatron_m1.model.config import ModelConfig
from tests.training.small_run import MODEL
from tools.hf_minimax import hf_config

# The class of transformers rotates whole heads.
WHOLE = replace(MODEL, name="minimax", rotary_dim=MODEL.head_dim)
PARTIAL = replace(WHOLE, name="minimax_m1", rotary_dim=8)
SMALL = 50_000  # bytes of a file, so that there are some


def transformers_model(seed: int = 0, model: ModelConfig = WHOLE) -> MiniMaxForCausalLM:
    """A random model whose logits are of the size that trained models have."""
    torch.manual_seed(seed)
    hf = MiniMaxForCausalLM(hf_config(model, block_size=16, attn_implementation="eager"))
    with torch.no_grad():
        for parameter in hf.parameters():
            is_norm = parameter.dim() == 1
            parameter.normal_(mean=float(is_norm), std=0.1 if is_norm else 0.25)
    return hf.eval()


def write_toy(folder: Path, model: ModelConfig = WHOLE) -> Path:
    """A folder as transformers itself writes it."""
    transformers_model(model=model).save_pretrained(folder, max_shard_size="100KB")
    return folder


def import_folder(folder: Path, out: Path, dtype: str = "stored") -> Path:
    convert(import_job(recognise(folder), out, dtype, SMALL))
    return out


def export_checkpoint(
    path: Path, out: Path, name: str, dtype: str = "stored", **more: object
) -> Path:
    options = ExportOptions(name, dtype, SMALL, **more)  # type: ignore[arg-type]
    convert(export_job(path, out, options))
    return out


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder of safetensors."""
    opened = open_folder(folder)
    return {name: opened.read(name) for name in opened.names}


def parameters_of(path: Path) -> dict[str, Tensor]:
    """Every parameter of one of our checkpoints."""
    weights = checkpoint_weights(path)
    return {name: weights.read(name) for name in weights.parameters}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=0, atol=0, msg=name)
