"""What weights are written to: one of our checkpoints, or a folder of safetensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from megatron_m1.checkpoint.beside import json_bytes
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


@dataclass(frozen=True)
class OurCheckpoint:
    """Weights that any layout can load; no optimizer, no position of the data.

    Attributes:
        texts: the files beside the weights.
    """

    parameters: Mapping[str, MappedParameter]
    forms: Mapping[str, Form]
    texts: Mapping[str, bytes]

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
        for name, text in self.texts.items():
            entries[name] = write_file(folder / name, text)
        write_file(folder / MANIFEST, manifest_bytes(entries))


@dataclass(frozen=True)
class SafetensorsFolder:
    """Weights for other programs.

    Attributes:
        model: our sizes, by which operations unpack.
        derived: tensors that follow from the sizes.
        block_size: tokens of a block of lightning attention, for those.
        texts: the files beside the weights.
    """

    model: ModelConfig
    parameters: Mapping[str, MappedParameter]
    forms: Mapping[str, Form]
    derived: Mapping[str, Form]
    block_size: int
    texts: Mapping[str, bytes]

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
        for name, text in {**self.texts, hf_folder.INDEX: json_bytes(index)}.items():
            write_file(folder / name, text)
