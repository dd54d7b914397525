"""What goes out beside the weights: config.json and the files of tokenizer and generation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_m1.checkpoint.beside import (
    FOREIGN_CONFIG,
    GENERATION,
    TOKEN_IDS,
    TOKENIZER,
    json_bytes,
    read_inside,
    read_side_files,
)
from megatron_m1.checkpoint.models import saved_config
from megatron_m1.conversion.families import Family
from megatron_m1.conversion.foreign_config import WITHOUT_EFFECT
from megatron_m1.conversion.hf_folder import CONFIG, read_json
from megatron_m1.conversion.safetensors_file import Form
from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.errors import InputError
from megatron_m1.model.config import ModelConfig

_LENGTH = "max_position_embeddings"
# Mean the same in every architecture.
_SHARED = (*TOKEN_IDS, _LENGTH, "initializer_range")
_MAX_LENGTH = 10_240_000  # as released


def read_like(path: Path, like: Path | None, family: Family) -> dict[str, Any]:
    """The keys of an original config.json that say nothing about the weights.

    Args:
        path: our checkpoint, which has one where its weights were once imported.
        like: the folder to take it from instead, an original or a checkpoint.

    Raises:
        InputError: there is no such folder.
    """
    if like and not like.is_dir():
        raise InputError(f"--like {like} is no folder")
    source = like or path
    file = source / (FOREIGN_CONFIG if (source / FOREIGN_CONFIG).exists() else CONFIG)
    if not file.exists():
        return {}
    content = read_json(file)
    is_same = (content.get("architectures") or [None])[0] in family.architectures
    kept = WITHOUT_EFFECT if is_same else _SHARED
    return {key: value for key, value in content.items() if key in kept}


def config_of(
    path: Path,
    model: ModelConfig,
    family: Family,
    forms: Mapping[str, Form],
    like: Mapping[str, Any],
    max_length: int | None,
) -> dict[str, Any]:
    """The config.json of a checkpoint in a format.

    Args:
        like: keys of an original, which give way to what the checkpoint says.
        max_length: the longest sequence; None is the longer of the original's and what the run
            trained on.
    """
    trained = (saved_config(path).get("train") or {}).get("seq_length")
    said = [length for length in (like.get(_LENGTH), trained) if type(length) is int]
    max_length = max_length or max(said, default=_MAX_LENGTH)
    found = _tokenizer(path)
    return {
        **dict.fromkeys(TOKEN_IDS),
        **({"eos_token_id": found[0].eod} if found else {}),
        **like,
        "architectures": [family.architectures[0]],
        "model_type": family.model_type,
        **family.words.write(model, max_length),
        # The name of old and of new versions.
        "torch_dtype": _main_dtype(forms),
        "dtype": _main_dtype(forms),
    }


def export_texts(config: Mapping[str, Any], path: Path, source: Path) -> dict[str, bytes]:
    """Every file to write beside weights and index, by name.

    Args:
        config: what config.json says.
        path: our checkpoint, from which tokenizer and generation are told where ``source`` has no
            file for them.
        source: the folder whose files are copied.

    Raises:
        InputError: one of those cannot be copied.
    """
    ids = {key: config[key] for key in TOKEN_IDS if config.get(key) is not None}
    texts = {GENERATION: json_bytes(ids)}
    found = _tokenizer(path)
    if found:
        told = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": found[1],
            "model_max_length": config[_LENGTH],
            "clean_up_tokenization_spaces": False,
        }
        texts["tokenizer_config.json"] = json_bytes(told)
    return {**texts, **read_side_files(source), CONFIG: json_bytes(config)}


def import_texts(source: Path, config: dict[str, Any]) -> dict[str, bytes]:
    """Every file of our checkpoint beside its weights, by name.

    Args:
        source: the folder that is imported.
        config: what config.json says.

    Raises:
        InputError: a file of the folder cannot be copied.
    """
    foreign = read_inside(source, CONFIG)
    return {**read_side_files(source), FOREIGN_CONFIG: foreign, CONFIG: json_bytes(config)}


def _tokenizer(path: Path) -> tuple[Tokenizer, str] | None:
    """The checkpoint's tokenizer and the text of its end of document, where a run named it."""
    eod = (saved_config(path).get("data") or {}).get("eod")
    if eod is None or not (path / TOKENIZER).is_file():
        return None
    try:
        return Tokenizer.load(path, eod), eod
    except ValueError:
        # An import's, which the run did not read by.
        return None


def _main_dtype(forms: Mapping[str, Form]) -> str:
    """The type of most bytes."""
    sizes: Counter[torch.dtype] = Counter()
    for form in forms.values():
        sizes[form.dtype] += form.size
    return str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")
