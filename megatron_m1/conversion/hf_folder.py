"""A folder of safetensors in Hugging Face's form: config.json, an index, shards, text files.

Weights of strangers come in here, so only safetensors are read, a shard's name cannot lead out of
the folder, and nothing that is code is run or copied.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_m1.checkpoint.beside import inside
from megatron_m1.checkpoint.folders import holds_checkpoints
from megatron_m1.conversion.journal import refuse_unfinished
from megatron_m1.conversion.safetensors_file import Form, StoredTensor, read_header
from megatron_m1.conversion.weights import shown
from megatron_m1.errors import InputError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHARD_NAME = re.compile(r"[A-Za-z0-9][\w.-]*\.safetensors")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class HfFolder:
    """The tensors of a folder.

    Attributes:
        shards: the file of each tensor.
        tensors: their places; empty where the folder has an index but no shards yet.
        total_size: bytes that the index speaks of; None without an index.
    """

    path: Path
    config: dict[str, Any]
    shards: dict[str, str]
    tensors: dict[str, StoredTensor]
    total_size: int | None

    @property
    def names(self) -> set[str]:
        return set(self.shards)

    def form(self, name: str) -> Form:
        return self.tensors[name].form

    def read(self, name: str, slot: int | None = None) -> Tensor:
        """A tensor, or part ``slot`` of its first axis."""
        return self.tensors[name].read(slot)

    def files(self) -> dict[str, Path]:
        """The shards that are there, by name."""
        return {stored.file.name: stored.file for stored in self.tensors.values()}


def open_folder(path: Path, without_shards: bool = False) -> HfFolder:
    """Read a folder's configuration, index and the headers of its shards.

    Args:
        without_shards: take a folder that has an index and not one of its shards.

    Raises:
        InputError: something is missing, damaged, pickled, or leads out of the folder.
    """
    if not path.is_dir():
        raise InputError(f"{path} is no folder: give one with {CONFIG} and safetensors files")
    index, single = path / INDEX, path / SINGLE
    if not index.exists() and not single.exists():
        raise InputError(_no_weights(path))
    config = read_json(path / CONFIG)
    if index.exists():
        shards, total_size = _read_index(index)
    else:
        shards, total_size = dict.fromkeys(read_header(inside(path, SINGLE)), SINGLE), None
    needed = sorted(set(shards.values()))
    missing = [name for name in needed if not (path / name).exists()]
    if without_shards and missing == needed:
        return HfFolder(path, config, shards, {}, total_size)
    if missing:
        raise InputError(f"{path} lacks {len(missing)} of {len(needed)} shards: {shown(missing)}")
    headers = {name: read_header(inside(path, name)) for name in needed}
    _compare_with_index(index, shards, headers)
    found = {name: headers[shard][name] for name, shard in shards.items()}
    return HfFolder(path, config, shards, found, total_size)


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        InputError: it is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value


def _read_index(path: Path) -> tuple[dict[str, str], int | None]:
    content = read_json(path)
    shards, metadata = content.get("weight_map"), content.get("metadata") or {}
    if not isinstance(shards, dict) or not shards or not isinstance(metadata, dict):
        raise InputError(f"{path} has no weight_map from tensors to shards")
    for name, shard in shards.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise InputError(
                f"{path} puts {name} into {shard!r}: a shard is a *.safetensors file of its folder"
            )
    size = metadata.get("total_size")
    if isinstance(size, int) or (isinstance(size, float) and math.isfinite(size)):
        return shards, int(size)
    return shards, None


def _no_weights(path: Path) -> str:
    refuse_unfinished(path)
    if holds_checkpoints(path):
        return (
            f"{path} holds a checkpoint of this project and no safetensors: write some by "
            f"tools/convert_checkpoint.py export --ckpt {path} --hf DIR"
        )
    pickled = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLED)
    if pickled:
        return (
            f"{path} holds its weights pickled ({shown(pickled)}), and reading those can run code "
            "that they bring: save them as safetensors first"
        )
    return f"{path} has neither {INDEX} nor {SINGLE}"


def _compare_with_index(
    index: Path, shards: Mapping[str, str], headers: Mapping[str, Mapping[str, StoredTensor]]
) -> None:
    lost = [name for name, shard in shards.items() if name not in headers[shard]]
    if lost:
        raise InputError(f"{index} puts {shown(lost)} into {shards[lost[0]]}, which lacks it")
    for shard, header in headers.items():
        # Also what the index puts into another shard: nobody knows which of both is meant.
        extra = [name for name in header if shards.get(name) != shard]
        if extra:
            raise InputError(
                f"{index.parent / shard} holds {shown(extra)}, which {index} does not put there"
            )


def index_of(shards: Mapping[str, Mapping[str, Form]]) -> dict[str, Any]:
    """The index of shards that hold the given tensors."""
    forms = [form for tensors in shards.values() for form in tensors.values()]
    return {
        "metadata": {
            "total_parameters": sum(math.prod(form.shape) for form in forms),
            "total_size": sum(form.size for form in forms),
        },
        "weight_map": {
            name: shard for shard, tensors in sorted(shards.items()) for name in sorted(tensors)
        },
    }
