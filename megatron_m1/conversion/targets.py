"""What weights are written to: one of our checkpoints, or a folder of safetensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_m1.checkpoint.disk import write_file
from megatron_m1.checkpoint.manifest import MANIFEST, Entry
from megatron_m1.checkpoint.manifest import as_bytes as manifest_bytes
from megatron_m1.checkpoint.mapping import MappedParameter
from megatron_m1.conversion import hf_folder
from megatron_m1.conversion.decays import decay
from megatron_m1.conversion.distributed_writer import (
    Part,
    Written,
    write_common,
    write_parts,
    write_table,
)
from megatron_m1.conversion.journal import Record
from megatron_m1.conversion.safetensors_file import Form, SafetensorsWriter
from megatron_m1.conversion.shards import Shard
from megatron_m1.model.config import ModelConfig

FOREIGN_CONFIG = "foreign_config.json"
"""The config.json that imported weights came with, inside our checkpoint."""


@dataclass(frozen=True)
class OurCheckpoint:
    """Weights that any layout can load; no optimizer, no position of the data.

    Attributes:
        config: what config.json says.
        source: where tokenizer and generation files are copied from.
    """

    parameters: Mapping[str, MappedParameter]
    forms: Mapping[str, Form]
    config: dict[str, Any]
    source: Path

    def write(self, folder: Path, shard: Shard, read: Callable[[str], Tensor]) -> Record:
        parts = []
        for ours in shard.parameters:
            mapped = self.parameters[ours]
            ((name, _),) = mapped.theirs
            parts.append(Part(name, mapped.slot, partial(self._make, read, ours, name)))
        written, entry = write_parts(folder / shard.file, parts, self.forms)
        return Record(shard.file, entry.size, entry.sha256, [asdict(one) for one in written])

    def _make(self, read: Callable[[str], Tensor], ours: str, name: str) -> Tensor:
        return read(ours).to(self.forms[name].dtype)

    def finish(self, folder: Path, records: Mapping[str, Record]) -> None:
        files = {
            record.file: [Written(**one) for one in record.content] for record in records.values()
        }
        entries = {file: Entry(record.size, record.sha256) for file, record in records.items()}
        entries |= write_table(folder, self.forms, files)
        entries |= write_common(folder, {"progress": {"step": 0, "tokens": 0}})
        for name, text in self._texts().items():
            entries[name] = write_file(folder / name, text)
        write_file(folder / MANIFEST, manifest_bytes(entries))

    def _texts(self) -> dict[str, bytes]:
        """Tokenizer, generation and configuration files."""
        names = hf_folder.side_files(self.source)
        texts = {name: hf_folder.read_inside(self.source, name) for name in names}
        texts[FOREIGN_CONFIG] = hf_folder.read_inside(self.source, hf_folder.CONFIG)
        return {**texts, hf_folder.CONFIG: hf_folder.json_bytes(self.config)}


@dataclass(frozen=True)
class SafetensorsFolder:
    """Weights for other programs.

    Attributes:
        model: our sizes, by which operations unpack.
        derived: tensors that follow from the sizes.
        block_size: tokens of a block of lightning attention, for those.
        config: what config.json says.
        source: where tokenizer and generation files are copied from.
        texts: JSON files to write where the source has none.
    """

    model: ModelConfig
    parameters: Mapping[str, MappedParameter]
    forms: Mapping[str, Form]
    derived: Mapping[str, Form]
    block_size: int
    config: dict[str, Any]
    source: Path
    texts: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def write(self, folder: Path, shard: Shard, read: Callable[[str], Tensor]) -> Record:
        names = {name for ours in shard.parameters for name, _ in self.parameters[ours].theirs}
        forms = {name: form for name, form in self.forms.items() if name in names}
        forms |= {name: self.derived[name] for name in shard.derived}
        with SafetensorsWriter(folder / shard.file, forms) as file:
            for ours in shard.parameters:
                self._put(file, self.parameters[ours], read(ours))
            for name in shard.derived:
                file.put(name, decay(name, self.model, self.block_size))
        return Record(shard.file, file.entry.size, file.entry.sha256, list(forms))

    def _put(self, file: SafetensorsWriter, mapped: MappedParameter, parameter: Tensor) -> None:
        operation = mapped.operation
        tensors = operation.unpack(operation.view(parameter, self.model), self.model)
        for (name, _), tensor in zip(mapped.theirs, tensors, strict=True):
            file.put(name, tensor.to(self.forms[name].dtype))

    def finish(self, folder: Path, records: Mapping[str, Record]) -> None:
        forms = {**self.forms, **self.derived}
        index = hf_folder.index_of(
            {
                file: {name: forms[name] for name in record.content}
                for file, record in records.items()
            }
        )
        texts = {name: hf_folder.json_bytes(content) for name, content in self.texts.items()}
        for name in hf_folder.side_files(self.source):
            texts[name] = hf_folder.read_inside(self.source, name)
        texts[hf_folder.INDEX] = hf_folder.json_bytes(index)
        texts[hf_folder.CONFIG] = hf_folder.json_bytes(self.config)
        for name, text in texts.items():
            write_file(folder / name, text)
