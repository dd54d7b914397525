"""The policy's weights in a folder that a server can load, one for each version."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_m1.conversion.convert import convert
from megatron_m1.conversion.jobs import ExportOptions, export_job

_SHARD_BYTES = 5 * 10**9


def publish_folder(
    checkpoint: Path,
    folder: Path,
    version: int,
    *,
    format: str = "minimax_m1",
    like: Path | None = None,
    dtype: str = "stored",
    max_length: int | None = None,
) -> str:
    """Export a checkpoint to ``folder/policy-VERSION``, whose path servers take for a model's name.
    The folder of the version before the last is removed: no request is left that asks for it.

    Args:
        format: a name from ``conversion.families``.
        like: a folder with the tokenizer and further keys of config.json.

    Raises:
        InputError: the checkpoint is damaged, or the format cannot say what the model does.
        StorageError: the disk does not take it.
    """
    out = folder / f"policy-{version}"
    permutes = format == "transformers"
    options = ExportOptions(format, dtype, _SHARD_BYTES, permutes, like, max_length)
    if not out.exists():
        folder.mkdir(parents=True, exist_ok=True)
        convert(export_job(checkpoint, out, options))
    for old in folder.glob("policy-*"):
        number = old.name.removeprefix("policy-")
        if number.isdecimal() and int(number) < version - 1:
            shutil.rmtree(old, ignore_errors=True)
    return str(out.resolve())
