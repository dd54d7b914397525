"""What weights are: the format and the model of a folder of safetensors or of a checkpoint.

Recognising reads configurations and the names of tensors, nothing else.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_m1.checkpoint.mapping import mapped_parameters
from megatron_m1.checkpoint.models import saved_model
from megatron_m1.conversion import hf_folder
from megatron_m1.conversion.decays import decay_forms, decay_problems
from megatron_m1.conversion.distributed_folder import DistributedFolder
from megatron_m1.conversion.families import DISTRIBUTED, FAMILIES, Family
from megatron_m1.conversion.foreign_config import Described
from megatron_m1.conversion.hf_folder import HfFolder, open_folder
from megatron_m1.conversion.safetensors_file import Form
from megatron_m1.conversion.weights import Weights
from megatron_m1.errors import InputError
from megatron_m1.model.config import ModelConfig

_CONFIG_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Recognised:
    """A folder of safetensors whose format and model are known."""

    folder: HfFolder
    family: Family
    described: Described

    @property
    def model(self) -> ModelConfig:
        return self.described.model

    @cached_property
    def decays(self) -> dict[str, Form]:
        """Tensors that may be there beside the weights."""
        if not self.family.has_decays:
            return {}
        return decay_forms(self.model, self.described.block_size)

    @cached_property
    def weights(self) -> Weights:
        return Weights(self.model, self.family.parameters(self.model), self.folder)

    def problems(self) -> list[str]:
        """What keeps the weights from being the model's."""
        found = self.weights.name_problems(self.decays)
        if self.folder.tensors:
            found += self.weights.form_problems() + self.decay_problems()
        return found

    def decay_problems(self) -> list[str]:
        """Which stored decays are not those of the model."""
        stored = self.decays.keys() & self.folder.names
        return decay_problems(stored, self.folder.read, self.model, self.described.block_size)

    @property
    def has_rounded_decays(self) -> bool:
        """Whether those that are stored have fewer digits than FP32."""
        stored = self.decays.keys() & self.folder.names
        return any(self.folder.form(name).dtype != torch.float32 for name in stored)

    def likely_forms(self) -> dict[str, Form]:
        """The tensors of a folder without its shards, in the type that config.json says; routers as
        MiniMax's own code stores them, in FP32."""
        dtype = _CONFIG_DTYPES.get(self.described.dtype or "bfloat16", torch.bfloat16)
        return {
            name: Form(torch.float32 if mapped.is_router else dtype, shape)
            for mapped in self.weights.parameters.values()
            for name, shape in mapped.theirs
        }


def recognise(path: Path, without_shards: bool = False, ignore: Collection[str] = ()) -> Recognised:
    """Find out what a folder holds.

    Args:
        without_shards: take an index without its shards.
        ignore: keys of config.json that are not looked at.

    Raises:
        InputError: it is none of the formats that are known, or of a model that is not.
    """
    folder = open_folder(path, without_shards)
    config = {key: value for key, value in folder.config.items() if key not in ignore}
    candidates = _candidates(config, path)
    problems: list[str] = []
    described = candidates[0].words.read(config, problems)
    if problems:
        sentences = "; ".join(problems)
        raise InputError(f"{path / hf_folder.CONFIG}: {sentences}")
    found = [Recognised(folder, family, described) for family in candidates]
    # One configuration may stand for two ways of naming: the nearer one is meant.
    return min(found, key=lambda one: len(one.weights.expected().keys() ^ folder.names))


def _candidates(config: dict[str, Any], path: Path) -> list[Family]:
    named = config.get("architectures") or [None]
    name = named[0] if isinstance(named, list) else named
    kind = None if name else config.get("model_type")
    found = [f for f in FAMILIES if name in f.architectures or kind == f.model_type]
    if not found:
        known = ", ".join(dict.fromkeys(a for family in FAMILIES for a in family.architectures))
        raise InputError(
            f"{path / hf_folder.CONFIG} is of the architecture {name or kind}; known are {known}"
        )
    return found


def checkpoint_weights(path: Path) -> Weights:
    """The weights of one of our checkpoints.

    Raises:
        InputError: its table or configuration cannot be read.
    """
    model = saved_model(path)
    return Weights(model, mapped_parameters(model, DISTRIBUTED), DistributedFolder(path))


def refuse(path: Path, problems: list[str]) -> None:
    """
    Raises:
        InputError: there are problems; it names them all.
    """
    if problems:
        sentences = "; ".join(problems)
        raise InputError(f"{path}: {sentences}")
