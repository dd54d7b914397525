"""Rotation restarts in each document. The softmax of scores cannot show it: it knows differences of
positions only, until they are so large that their angles lose digits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_m1.model.build import build_chunks, forward_row, unwrap
from megatron_m1.model.row_params import RowParams
from megatron_m1.model.softmax_attention import VarlenCoreAttention
from megatron_m1.model.transformer_config import transformer_config
from parallel.layout import CUTS, Layout
from parallel.packing import PackedRow
from tests.training.small_run import MODEL


@pytest.mark.parametrize("kind", CUTS)
def test_angles_are_those_of_places_in_documents(kind: str) -> None:
    # Tokens that are their own places, so that each part of the row says what it should be.
    row = PackedRow.from_documents([torch.arange(length) for length in (3, 1, 9, 2, 1)])
    for part in [row, *(row.cut(2, rank, kind) for rank in range(2))]:
        cos, sin = RowParams.of(part).rope(rotary_dim=4, theta=100.0)
        angles = part.tokens[:, None] * torch.tensor([1.0, 0.1])
        torch.testing.assert_close((cos, sin), (angles.cos(), angles.sin()))


def test_a_document_has_the_same_keys_wherever_it_lies(single_process: Layout) -> None:
    (chunk,) = build_chunks(MODEL, transformer_config(MODEL, Layout()), seed=3)
    seen: list[tuple[Tensor, Tensor]] = []

    def note(module: Any, heads: tuple[Tensor, ...]) -> None:
        seen.append(heads[:2])

    for module in unwrap(chunk).modules():
        if isinstance(module, VarlenCoreAttention):
            module.register_forward_pre_hook(note)
    document = torch.arange(17)
    with torch.no_grad():
        forward_row(chunk, PackedRow.from_documents([document, torch.arange(5), document]))
    ((query, key),) = seen
    assert not torch.equal(key[0], key[1])
    for heads in (query, key):
        torch.testing.assert_close(heads[22:], heads[:17], rtol=0, atol=1e-4)
