"""Reading the pickled files of a checkpoint without running what somebody may have put there.

torch's distributed checkpoints describe themselves in a pickle, ``.metadata``, and torch's own
reader calls whatever that pickle names. Here the bytes are read once and unpickled with a list of
the names that such a file has; the result is what the reader gets.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from megatron_m1.checkpoint.folders import METADATA
from megatron_m1.errors import InputError

COMMON = "common.pt"

_TORCH_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *(
        (_TORCH_METADATA, name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
            *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    # Where the checkpoint was written.
    ("pathlib", "PosixPath"),
}
# The name in torch's page of advice about a pickle that it refused.
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")


class Forbidden(Exception):
    """A pickle asks for something that no checkpoint needs; the text is its name."""


class _AllowList(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _ALLOWED or is_dtype:
            return super().find_class(module, name)
        raise Forbidden(f"{module}.{name}")

    def persistent_load(self, what: Any) -> Any:
        raise Forbidden("a reference to something outside")


def read_metadata(folder: Path) -> Metadata:
    """What torch's ``.metadata`` of a checkpoint says.

    Raises:
        InputError: it is missing, damaged, names what it must not name, or files elsewhere.
    """
    path = folder / METADATA
    try:
        found = _AllowList(io.BytesIO(path.read_bytes())).load()
    except Forbidden as error:
        raise refusal(path, str(error)) from None
    except Exception as error:
        # A damaged pickle can raise anything.
        raise InputError(f"{path} cannot be read: {type(error).__name__} {error}") from error
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
        raise InputError(f"{path} does not describe a checkpoint")
    for info in found.storage_data.values():
        if not _is_inside(info):
            raise InputError(f"{path} names {info}, which is no file of this checkpoint")
    return found


def read_common(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds beside its tensors: plain values.

    Raises:
        InputError: it is missing, damaged, or holds anything else.
    """
    return read_plain(folder / COMMON, folder / COMMON)


def read_plain(source: Path | io.BytesIO, path: Path) -> Any:
    """What ``torch.save`` wrote, where that is plain values and tensors.

    Args:
        path: where it lies, for the error.
    """
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        raise explained(error, path) from error


def explained(error: BaseException, path: Path) -> InputError:
    """What kept ``torch.load`` from reading, as one sentence."""
    if isinstance(error, InputError):
        return error
    refused = _REFUSED.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if refused:
        return refusal(path, refused[1])
    first_line = next(iter(str(error).splitlines()), "")
    return InputError(
        f"{path} cannot be read, a file is missing or damaged: {type(error).__name__} {first_line}"
    )


def refusal(path: Path, name: str) -> InputError:
    return InputError(
        f"{path} asks for {name}, which no checkpoint needs: it is not loaded, since that could "
        "run code that somebody put there"
    )


def _is_inside(info: Any) -> bool:
    return (
        isinstance(info, _StorageInfo)
        and isinstance(info.relative_path, str)
        and Path(info.relative_path).name == info.relative_path
        and not info.transform_descriptors
    )
