"""The log-probability of each next token of given rows.

B rows, T tokens of the longest row, V vocabulary.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_m1.errors import ConfigError, InputError
from megatron_m1.inference.load import Loaded
from megatron_m1.inference.logits import over_logits, padded_length
from parallel.layout import Layout
from parallel.packing import PackedRow


def read_tokens(path: str) -> list[NDArray[np.int64]]:
    """Rows of token ids from a ``.npy`` of [B, T] or a ``.jsonl`` with a list (or an object with
    ``tokens``) a line.

    Raises:
        InputError: the file is missing or holds something else.
    """
    if not path:
        raise ConfigError(["tokens is missing: give tokens=FILE.npy or tokens=FILE.jsonl"])
    try:
        if path.endswith(".npy"):
            rows = list(np.load(path))
        elif path.endswith(".jsonl"):
            lines = Path(path).read_text().splitlines()
            rows = [_ids(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
        else:
            raise InputError(f"tokens={path} ends in neither .npy nor .jsonl")
    except (OSError, ValueError) as error:
        raise InputError(f"tokens={path} cannot be read: {error}") from error
    for number, row in enumerate(rows):
        if np.ndim(row) != 1 or not np.issubdtype(np.asarray(row).dtype, np.integer):
            raise InputError(f"tokens={path}: row {number} is not a list of whole numbers")
    if not rows or max(len(row) for row in rows) < 2:
        raise InputError(f"tokens={path} has no row of two tokens or more: nothing to score")
    return [np.asarray(row, dtype=np.int64) for row in rows]


def _ids(line: str, where: str) -> Any:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON: {error}") from error
    return np.asarray(value["tokens"] if isinstance(value, dict) else value)


def score(
    loaded: Loaded, layout: Layout, rows: list[NDArray[np.int64]], micro_batch: int
) -> NDArray[np.float32]:
    """[B, T-1] float32 log-probabilities of each row's next tokens; NaN past a row's end.

    Raises:
        InputError: a token id outside the vocabulary.
    """
    vocabulary, longest = loaded.model.vocab_size, max(len(row) for row in rows)
    for number, row in enumerate(rows):
        if len(row) and not 0 <= row.min() <= row.max() < vocabulary:
            raise InputError(f"row {number} holds ids outside the vocabulary 0..{vocabulary - 1}")
    scores = np.full((len(rows), longest - 1), np.nan, dtype=np.float32)
    length = padded_length(micro_batch * longest, layout)
    groups = [rows[start : start + micro_batch] for start in range(0, len(rows), micro_batch)]
    for index, group in enumerate(groups):
        packed = PackedRow.from_documents([torch.from_numpy(row) for row in group], pad_to=length)
        (flat,) = over_logits(loaded.chunks, [packed], _next_token, (length,))
        start = 0
        for offset, row in enumerate(group):
            part = flat[start : start + len(row) - 1].cpu().numpy()
            scores[index * micro_batch + offset, : len(row) - 1] = part
            start += len(row)
    return scores


def _next_token(logits: Tensor, row: PackedRow) -> Tensor:
    """[T, V] -> [T], the log-probability of each position's label."""
    return logits.log_softmax(-1).gather(-1, row.labels[:, None])[:, 0]


def write_scores(scores: NDArray[np.float32], path: str) -> None:
    """Write under the final name only when whole."""
    if not path.endswith(".npy"):
        raise ConfigError([f"out={path or 'missing'}: give out=FILE.npy"])
    partial = Path(f"{path}.tmp")
    try:
        with partial.open("wb") as file:
            np.save(file, scores)
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"out={path} cannot be written: {error}") from error
