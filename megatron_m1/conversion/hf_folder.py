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

from megatron_m1.conversion.safetensors_file import Form, StoredTensor, read_header
from megatron_m1.conversion.weights import shown
from megatron_m1.errors import InputError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What belongs to a model beside its weights, and holds no code.
SIDE_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
    "generation_config.json",
)
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
    config = read_json(path / CONFIG)
    index, single = path / INDEX, path / SINGLE
    if index.exists():
        shards, total_size = _read_index(index)
    elif single.exists():
        shards, total_size = dict.fromkeys(read_header(_inside(path, SINGLE)), SINGLE), None
    else:
        raise InputError(_no_weights(path))
    needed = sorted(set(shards.values()))
    missing = [name for name in needed if not (path / name).exists()]
    if without_shards and missing == needed:
        return HfFolder(path, config, shards, {}, total_size)
    if missing:
        raise InputError(f"{path} lacks {len(missing)} of {len(needed)} shards: {shown(missing)}")
    found: dict[str, StoredTensor] = {}
    for name in needed:
        found |= read_header(_inside(path, name))
    _compare_with_index(index, shards, found)
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
    return shards, int(size) if isinstance(size, int | float) else None


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder, or of the cache of downloads whose snapshot the folder is.

    Raises:
        InputError: it is a link to somewhere else.
    """
    target = (folder / name).resolve()
    # A snapshot of Hugging Face's cache is a folder of links: snapshots/REVISION -> blobs.
    homes = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        homes.append(folder.resolve().parents[1] / "blobs")
    if target.parent not in homes:
        raise InputError(f"{folder / name} is a link out of its folder, to {target}: copy it there")
    return target


def _no_weights(path: Path) -> str:
    pickled = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLED)
    if pickled:
        return (
            f"{path} holds its weights pickled ({shown(pickled)}), and reading those can run code "
            "that they bring: save them as safetensors first"
        )
    return f"{path} has neither {INDEX} nor {SINGLE}"


def _compare_with_index(
    index: Path, shards: Mapping[str, str], found: Mapping[str, StoredTensor]
) -> None:
    lost = [name for name in shards if name not in found]
    if lost:
        raise InputError(f"{index} puts {shown(lost)} into {shards[lost[0]]}, which lacks it")
    extra = [name for name in found if name not in shards]
    if extra:
        raise InputError(f"{found[extra[0]].file} holds {shown(extra)}, of which {index} is silent")


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


def json_bytes(value: dict[str, Any]) -> bytes:
    """A JSON file that people can read."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def side_files(folder: Path) -> list[str]:
    """Which of the tokenizer's and generation's files a folder has."""
    return [name for name in SIDE_FILES if (folder / name).is_file()]


def read_inside(folder: Path, name: str) -> bytes:
    """A file of the folder.

    Raises:
        InputError: it leads out of it.
    """
    return _inside(folder, name).read_bytes()
