"""Import and export: from folders and options to a job for ``convert``."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_m1.checkpoint.folders import METADATA
from megatron_m1.checkpoint.mapping import mapped_parameters
from megatron_m1.checkpoint.models import IMPORTED
from megatron_m1.conversion import distributed_writer, hf_folder
from megatron_m1.conversion.convert import Job
from megatron_m1.conversion.decays import decay_forms
from megatron_m1.conversion.families import BY_NAME, DISTRIBUTED, Family
from megatron_m1.conversion.foreign_config import BLOCK_SIZE
from megatron_m1.conversion.hf_folder import HfFolder
from megatron_m1.conversion.recognition import Recognised, checkpoint_weights, refuse
from megatron_m1.conversion.shards import divide, target_forms
from megatron_m1.conversion.side_files import config_of, export_texts, import_texts, read_like
from megatron_m1.conversion.targets import OurCheckpoint, SafetensorsFolder
from megatron_m1.model.config import ModelConfig


def import_job(given: Recognised, out: Path, dtype: str, shard_size: int) -> Job:
    """Weights of a folder of safetensors into one of our checkpoints.

    Args:
        dtype: a key of ``shards.DTYPES``.
        shard_size: bytes of a file.

    Raises:
        InputError: the folder lacks tensors or has other ones.
    """
    refuse(given.folder.path, given.problems())
    target = mapped_parameters(given.model, DISTRIBUTED)
    forms = target_forms(given.weights, target, dtype)
    shards = divide(target, forms, {}, shard_size, _our_file, whole_tensors=False)
    config = {
        "model": asdict(given.model),
        IMPORTED: {"format": given.family.name, "dtype": dtype},
    }
    writer = OurCheckpoint(target, forms, import_texts(given.folder.path, config))
    identity = {
        "source": _identity(given.folder),
        "config": config,
        "dtype": dtype,
        "shard_size": shard_size,
    }
    return Job(given.weights, writer, shards, out, identity)


@dataclass(frozen=True)
class ExportOptions:
    """How to write a folder of safetensors.

    Attributes:
        format: a name from ``families``.
        permute_rope: write a partial rotation in the order of a class that rotates whole heads.
        like: a folder with the tokenizer, generation files and further keys of config.json; None
            takes what the checkpoint brought from its import.
        max_length: what config.json calls the longest sequence; None is ``like``'s.
    """

    format: str
    dtype: str
    shard_size: int
    permute_rope: bool = False
    like: Path | None = None
    max_length: int | None = None


def export_job(path: Path, out: Path, options: ExportOptions) -> Job:
    """Weights of one of our checkpoints into a folder of safetensors.

    Raises:
        InputError: the checkpoint is damaged, or the format cannot say what the model does.
    """
    weights, family = checkpoint_weights(path), BY_NAME[options.format]
    model = weights.model
    refuse(path, weights.name_problems() + weights.form_problems())
    refuse(path, _unsaid(model, family, options.permute_rope))
    target = family.parameters(model)
    forms = target_forms(weights, target, options.dtype)
    like = read_like(path, options.like, family)
    block = like.get("block_size", BLOCK_SIZE)
    derived = decay_forms(model, block) if family.has_decays else {}
    shards = divide(target, forms, derived, options.shard_size, _their_file, whole_tensors=True)
    config = config_of(path, model, family, forms, like, options.max_length)
    length = config.get("max_position_embeddings")
    if length and not (options.max_length or like.get("max_position_embeddings")):
        print(
            f"warning: {path} does not say how long sequences may be, so config.json gets "
            f"max_position_embeddings={length}: give --max-length, or --like with an original",
            file=sys.stderr,
        )
    texts = export_texts(config, path, options.like or path)
    writer = SafetensorsFolder(model, target, forms, derived, block, texts)
    identity = {
        "source": _identity_of_files(path / METADATA, *sorted(path.glob("*.distcp"))),
        "format": family.name,
        "config": config,
        "shard_size": options.shard_size,
        "dtype": options.dtype,
    }
    return Job(weights, writer, shards, out, identity)


def _unsaid(model: ModelConfig, family: Family, permute_rope: bool) -> list[str]:
    """What the model does that the format cannot say."""
    found = family.words.unsaid(model)
    if family.in_halves and model.rotary_dim < model.head_dim and not permute_rope:
        found.append(
            f"it rotates {model.rotary_dim} of a head's {model.head_dim} dimensions, and "
            "transformers' MiniMaxForCausalLM rotates all of them without a word: its logits would "
            "be wrong. --permute-rope writes q and k in another order with frequencies to match, "
            "which it computes right; --format minimax_m1 is MiniMax's own form"
        )
    return found


def _our_file(number: int, count: int) -> str:
    return distributed_writer.file_name(number)


def _their_file(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _identity(folder: HfFolder) -> dict[str, Any]:
    files = folder.files()
    return _identity_of_files(
        folder.path / hf_folder.CONFIG, *(files[name] for name in sorted(files))
    )


def _identity_of_files(table: Path, *files: Path) -> dict[str, Any]:
    """What tells weights from others without reading them."""
    return {
        "folder": str(table.parent.resolve()),
        "table": hashlib.sha256(table.read_bytes()).hexdigest(),
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    }
