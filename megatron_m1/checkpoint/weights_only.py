"""A checkpoint of the weights alone, as an import leaves them: a model for programs that do not
train it, in any layout."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from torch import nn

from megatron_m1.checkpoint import agreement, folders, manifest
from megatron_m1.checkpoint.beside import TOKENIZER
from megatron_m1.checkpoint.disk import (
    flushed,
    require_space,
    sync_folder,
    told_clearly,
    write_file,
)
from megatron_m1.checkpoint.models import IMPORTED
from megatron_m1.checkpoint.optimizer_state import LAYOUT
from megatron_m1.checkpoint.state import sharded_model
from megatron_m1.checkpoint.writing import Staged, Written, stage, write_common, write_metadata
from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.model.config import ModelConfig


def save_weights(
    chunks: list[nn.Module], model: ModelConfig, tokenizer: Tokenizer, path: Path
) -> None:
    """Write the weights to a folder that does not exist yet, which appears when it is whole.
    Collective.

    Raises:
        StorageError: they could not be written; nothing of them is left.
    """
    state = {**sharded_model(chunks), "content_metadata": dict(LAYOUT)}
    staged = agreement.everywhere(lambda: stage(state, copied=None))
    folder = _Folder(path, agreement.total(staged.size))
    agreement.on_first(folder.make)
    try:
        written = agreement.gather(agreement.everywhere(lambda: folder.write(staged)))
        agreement.on_first(lambda: folder.seal(staged, written or [], model, tokenizer))
    finally:
        agreement.on_first(lambda: folders.remove([folder.partial]))


class _Folder:
    """A folder on its way to its name.

    Args:
        needed: bytes of the tensors.
    """

    def __init__(self, path: Path, needed: int) -> None:
        self.path, self.needed = path, needed
        self.partial = path.with_name(path.name + folders.PARTIAL)

    def make(self) -> None:
        with self._told_clearly():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            require_space(self.path.parent, self.path.name, self.needed)
            self.partial.mkdir()

    def write(self, staged: Staged) -> Written:
        """This process's tensors."""
        with self._told_clearly():
            return staged.write(self.partial, dist.get_rank())

    def seal(
        self, staged: Staged, written: list[Written], model: ModelConfig, tokenizer: Tokenizer
    ) -> None:
        """Describe the whole, and give it its name."""
        partial = self.partial
        config = {
            "model": asdict(model),
            "data": {"eod": tokenizer.decode([tokenizer.eod])},
            IMPORTED: {"format": "megatron_m1", "dtype": "stored"},
        }
        with self._told_clearly():
            files = {name: entry for part in written for name, entry in part.files.items()}
            files |= {**write_common(staged, partial), **write_metadata(written, partial)}
            text = json.dumps(config, indent=1).encode()
            files[folders.CONFIG] = write_file(partial / folders.CONFIG, text)
            tokenizer.save(partial / TOKENIZER)
            files[TOKENIZER] = flushed(partial / TOKENIZER)
            write_file(partial / manifest.MANIFEST, manifest.as_bytes(files))
            sync_folder(partial)
            partial.rename(self.path)
            sync_folder(self.path.parent)

    def _told_clearly(self) -> AbstractContextManager[None]:
        return told_clearly(self.path.parent, self.path.name, self.needed)
