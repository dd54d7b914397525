"""The log-probability of each next token of given rows.

B rows, T tokens of the longest row.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from numpy.typing import NDArray
from torch import Tensor

from megatron_m1.errors import InputError
from megatron_m1.files import whole
from megatron_m1.inference.forward import forward_rows, padded_length
from megatron_m1.inference.load import Loaded
from parallel.layout import Layout
from parallel.packing import PackedRow

Ids = NDArray[np.int64]


def read_tokens(path: str) -> list[Ids]:
    """Rows of token ids from a ``.npy`` of [B, T], or a ``.jsonl`` with a list of ids (or an object
    with ``tokens``) a line.

    Raises:
        InputError: the file is missing or holds something else.
    """
    try:
        rows = _rows_of_array(path) if path.endswith(".npy") else _rows_of_lines(path)
    except (OSError, ValueError) as error:
        raise InputError(f"tokens={path} cannot be read: {error}") from error
    if max((len(row) for row in rows), default=0) < 2:
        raise InputError(f"tokens={path} has no row of two tokens or more: nothing to score")
    return rows


def _rows_of_array(path: str) -> list[Ids]:
    array = np.load(path)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"it holds {array.dtype} {array.shape}, not ids of [rows, tokens]")
    return list(array.astype(np.int64))


def _rows_of_lines(path: str) -> list[Ids]:
    rows = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        value = json.loads(line)
        ids = value.get("tokens") if isinstance(value, dict) else value
        if not isinstance(ids, list) or any(type(token) is not int for token in ids):
            raise ValueError(f'line {number} is neither a list of ids nor {{"tokens": [...]}}')
        rows.append(np.array(ids, dtype=np.int64))
    return rows


def score(loaded: Loaded, layout: Layout, rows: list[Ids], micro_batch: int) -> NDArray[np.float32]:
    """[B, T-1] float32 log-probabilities of each row's next tokens; NaN past a row's end. The
    data-parallel processes share the rows. Collective.

    Raises:
        InputError: a token id outside the vocabulary.
    """
    vocabulary = loaded.model.vocab_size
    for number, row in enumerate(rows):
        if len(row) and not 0 <= row.min() <= row.max() < vocabulary:
            raise InputError(f"row {number} has ids outside the vocabulary 0..{vocabulary - 1}")
    longest = max(len(row) for row in rows)
    groups = [rows[at : at + micro_batch] for at in range(0, len(rows), micro_batch)]
    flat = _score_groups(loaded, groups, padded_length(micro_batch * longest, layout))
    scores = np.full((len(rows), longest - 1), np.nan, dtype=np.float32)
    for index, row in enumerate(rows):
        group, place = divmod(index, micro_batch)
        start = sum(len(other) for other in groups[group][:place])
        part = slice(start, start + max(len(row) - 1, 0))
        scores[index, : part.stop - start] = flat[group, part]
    return scores


def _score_groups(loaded: Loaded, groups: list[list[Ids]], length: int) -> NDArray[np.float32]:
    """[groups, length], each group's rows side by side."""
    data = parallel_state.get_data_parallel_group()
    rank, size = data.rank(), data.size()
    # Processes exchange tokens for their experts, so each must take as many micro-batches: the last
    # group fills up.
    shared = groups + [groups[-1]] * (-len(groups) % size)
    packed = [
        PackedRow.from_documents([torch.from_numpy(row) for row in group], pad_to=length)
        for group in shared[rank::size]
    ]
    own = forward_rows(loaded.chunks, packed, _log_probabilities, length, with_loss=True)
    parts = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(parts, own, group=data)
    return torch.stack(parts, dim=1).flatten(0, 1)[: len(groups)].cpu().numpy()


def _log_probabilities(losses: Tensor, row: PackedRow) -> Tensor:
    return -losses[0]


def write_scores(scores: NDArray[np.float32], path: str) -> None:
    """Write the scores under their final name when they are whole."""
    try:
        with whole(Path(path)) as partial:
            np.save(partial, scores)
    except OSError as error:
        raise InputError(f"out={path} cannot be written: {error}") from error
