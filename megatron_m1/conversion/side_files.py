"""What goes out beside the weights: config.json and the files of tokenizer and generation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_m1.conversion.families import Family
from megatron_m1.conversion.foreign_config import WITHOUT_EFFECT
from megatron_m1.conversion.hf_folder import CONFIG, read_json
from megatron_m1.conversion.safetensors_file import Form
from megatron_m1.conversion.targets import FOREIGN_CONFIG
from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.errors import InputError
from megatron_m1.model.config import ModelConfig

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Mean the same in every architecture.
_SHARED = (*_TOKENS, "max_position_embeddings", "initializer_range")
_MAX_LENGTH = 10_240_000  # as released


def read_like(path: Path, like: Path | None, family: Family) -> dict[str, Any]:
    """The keys of an original config.json that say nothing about the weights.

    Args:
        path: our checkpoint, which has one where it was imported.
        like: the folder to take it from instead.

    Raises:
        InputError: there is no such folder.
    """
    if like and not like.is_dir():
        raise InputError(f"--like {like} is no folder")
    file = like / CONFIG if like else path / FOREIGN_CONFIG
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
        max_length: the longest sequence; None is the original's, or what the run trained on.
    """
    trained = (read_json(path / CONFIG).get("train") or {}).get("seq_length")
    max_length = max_length or like.get("max_position_embeddings") or trained or _MAX_LENGTH
    found = _tokenizer(path)
    return {
        **dict.fromkeys(_TOKENS),
        **({"eos_token_id": found[0].eod} if found else {}),
        **like,
        "architectures": [family.architectures[0]],
        "model_type": family.model_type,
        **family.words.write(model, max_length),
        # The name of old and of new versions.
        "torch_dtype": _main_dtype(forms),
        "dtype": _main_dtype(forms),
    }


def generated_texts(config: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """Files that transformers reads, where no original can be copied."""
    ids = {key: config[key] for key in _TOKENS if config.get(key) is not None}
    texts: dict[str, dict[str, Any]] = {"generation_config.json": ids}
    found = _tokenizer(path)
    if found:
        texts["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": found[1],
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        }
    return texts


def _tokenizer(path: Path) -> tuple[Tokenizer, str] | None:
    """The checkpoint's tokenizer and the text of its end of document, where a run named it."""
    eod = (read_json(path / CONFIG).get("data") or {}).get("eod")
    if eod is None or not (path / "tokenizer.json").is_file():
        return None
    return Tokenizer.load(path, eod), eod


def _main_dtype(forms: Mapping[str, Form]) -> str:
    """The type of most bytes."""
    sizes: Counter[torch.dtype] = Counter()
    for form in forms.values():
        sizes[form.dtype] += form.size
    return str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")
