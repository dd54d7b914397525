"""The logits of given tokens by our model and by transformers', from weights on the disk.

MiniMax's own code is not run: it came with somebody's weights. transformers' MiniMaxForCausalLM is
an independent implementation of the same model; for a partial rotation it takes the order of
``families.QueryGroupsInHalves``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import torch
from torch import Tensor

from megatron_m1.conversion.decays import decay, decay_forms
from megatron_m1.conversion.families import BY_NAME
from megatron_m1.conversion.recognition import Recognised
from megatron_m1.conversion.verification import (
    FAILED,
    OK,
    SKIPPED,
    Rung,
    Sides,
    narrower_dtypes,
)
from megatron_m1.conversion.weights import Weights
from megatron_m1.errors import InputError
from megatron_m1.model.config import ModelConfig

TOLERANCE = 1e-4  # of logits of size 1, in FP32
NOTHING: Mapping[str, torch.dtype] = MappingProxyType({})
_COPIES = 3  # a model in FP32, and what loading it takes beside


def compare_logits(sides: Sides, path: Path, given: Recognised, rows: Sequence[Tensor]) -> Rung:
    """The rung of the logits: ours from the checkpoint at ``path``, theirs from the folder. Where
    types differ, both are of weights that are rounded alike: what rounding does to the logits of a
    model has no bound, since it sends tokens to other experts."""
    reason = _reason_to_skip(sides)
    if reason:
        return Rung("logits", SKIPPED, reason)
    rounded = narrower_dtypes(sides)
    with _one_process():
        ours = our_logits(path, rows, rounded)
    theirs = their_logits(given, rows, rounded)
    # Maxima of tensors, which keep what is not a number.
    scale = torch.stack([logits.abs().max() for logits in theirs]).max().clamp(min=1).item()
    differences = [(a - b).abs().max() for a, b in zip(ours, theirs, strict=True)]
    largest = torch.stack(differences).max().item()
    tokens = sum(len(row) for row in rows)
    text = f"largest difference {largest:.2g} over {tokens} tokens, logits up to {scale:.2g}"
    text += ", of weights rounded alike" if rounded else ""
    text += ", with decays in FP32" if given.has_rounded_decays else ""
    return Rung("logits", OK if largest <= TOLERANCE * scale else FAILED, text)


def _reason_to_skip(sides: Sides) -> str | None:
    needed = _COPIES * 4 * sides.left.model.num_params()
    free = psutil.virtual_memory().available
    if needed > free:
        return f"the model needs {needed / 1e9:.1f} GB of memory in FP32, {free / 1e9:.1f} are free"
    return None


@contextmanager
def _one_process() -> Iterator[None]:
    from parallel import host

    host.enable()
    from megatron_m1.runtime import processes
    from parallel.layout import Layout

    with processes(Layout()):
        yield


def some_tokens(model: ModelConfig) -> list[Tensor]:
    """Two rows of random tokens."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(model.vocab_size, (2, 64), generator=generator))


def given_tokens(path: str, model: ModelConfig) -> list[Tensor]:
    """The rows of a file, in the forms that ``score`` takes.

    Raises:
        InputError: it cannot be read, or has ids that the model does not know.
    """
    from parallel import host

    host.enable()
    from megatron_m1.inference.scoring import read_tokens

    rows = [torch.from_numpy(row) for row in read_tokens(path) if len(row)]
    if any(row.min() < 0 or row.max() >= model.vocab_size for row in rows):
        raise InputError(f"tokens={path} has ids outside the vocabulary 0..{model.vocab_size - 1}")
    return rows


def our_logits(
    path: Path, rows: Sequence[Tensor], rounded: Mapping[str, torch.dtype] = NOTHING
) -> list[Tensor]:
    """[T, V] for each row, by a checkpoint, over the groups of one process.

    Args:
        rounded: types that parameters are rounded to before they are used, by our names.
    """
    from megatron_m1.inference.load import load_model
    from megatron_m1.model.build import forward_row
    from megatron_m1.model.parameters import local_parameters
    from parallel.layout import Layout
    from parallel.packing import PackedRow

    loaded = load_model(path, Layout(), "fp32")
    (chunk,) = loaded.chunks
    with torch.no_grad():
        for local in local_parameters(chunk, loaded.model):
            if dtype := rounded.get(local.mapped.ours):
                local.parameter.copy_(local.parameter.to(dtype))
        return [
            forward_row(chunk, PackedRow.from_documents([row]), with_loss=False)[0] for row in rows
        ]


def their_logits(
    given: Recognised, rows: Sequence[Tensor], rounded: Mapping[str, torch.dtype] = NOTHING
) -> list[Tensor]:
    """[T, V] for each row, by transformers from a folder of safetensors.

    Args:
        rounded: as for ``our_logits``.
    """
    from transformers import MiniMaxForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if given.family.name == "transformers" and not rounded and not given.has_rounded_decays:
        hf = MiniMaxForCausalLM.from_pretrained(
            given.folder.path,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            # Its config.json may name one whose code would be fetched.
            attn_implementation="sdpa",
            use_safetensors=True,
        )
    else:
        hf = transformers_model(given.weights, rounded)
    with torch.no_grad():
        return [hf.eval()(row[None], use_cache=False).logits[0] for row in rows]


def transformers_model(weights: Weights, rounded: Mapping[str, torch.dtype] = NOTHING) -> Any:
    """transformers' class with weights of any format, in FP32.

    Args:
        rounded: as for ``our_logits``.
    """
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    model, family = weights.model, BY_NAME["transformers_memory"]
    config = MiniMaxConfig(**family.words.write(model, max_length=1 << 20))
    hf = MiniMaxForCausalLM(config).float()
    state = hf.state_dict()
    with torch.no_grad():
        for ours, mapped in family.parameters(model).items():
            read = weights.read(ours)
            parameter = mapped.operation.view(read.to(rounded.get(ours, read.dtype)), model)
            parts = mapped.operation.unpack(parameter, model)
            for (name, _), part in zip(mapped.theirs, parts, strict=True):
                place = state[name] if mapped.slot is None else state[name][mapped.slot]
                place.copy_(part)
        for name in decay_forms(model, config.block_size):
            state[name].copy_(decay(name, model, config.block_size))
    return hf
