"""Training on rows that are cut over context-parallel ranks, against one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_m1.config import RunConfig
from megatron_m1.inference.forward import forward_rows
from megatron_m1.model.build import forward_row
from megatron_m1.model.schedule import run_schedule
from megatron_m1.training.metrics import cut_balance
from megatron_m1.training.step import train_step
from parallel.layout import Layout
from parallel.packing import PackedRow
from tests.distributed import Pool
from tests.training.small_run import (
    LAYOUTS,
    MODEL,
    small_config,
    start,
    weight_parts,
    whole_weights,
    write_data,
)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def gradients(config: RunConfig) -> dict[str, Any]:
    """Loss and gradients of one step."""
    run = start(replace(config, optim=replace(config.optim, distributed=False)))
    loss = train_step(run).loss
    return {"loss": loss, "weights": weight_parts(run, lambda weight: weight.main_grad)}


@pytest.fixture(scope="module")
def one_process(ranks: Callable[[int], Pool], prefix: str) -> dict[str, Any]:
    return ranks(1).run(gradients, small_config("unused", prefix))[0]


def assert_same_gradients(results: list[dict[str, Any]], one: dict[str, Any]) -> None:
    for result in results:
        assert result["loss"] == pytest.approx(one["loss"], rel=1e-5)
    whole = whole_weights(results)
    for name, gradient in whole_weights([one]).items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(whole[name], gradient, rtol=1e-4, atol=1e-4 * scale, msg=name)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name.startswith("cp")])
def test_gradients_are_those_of_one_process(
    name: str, ranks: Callable[[int], Pool], prefix: str, one_process: dict[str, Any]
) -> None:
    size, layout = LAYOUTS[name]
    config = small_config("unused", prefix, parallel=layout)
    assert_same_gradients(ranks(size).run(gradients, config), one_process)


@pytest.mark.parametrize("kind", ["balanced", "zigzag"])
def test_rows_of_any_length_are_padded(
    kind: str, ranks: Callable[[int], Pool], prefix: str
) -> None:
    """Padding is routed to experts too, so the routers' loss is left out."""
    config = small_config("unused", prefix, model=replace(MODEL, aux_loss_coef=0.0))
    config = replace(config, train=replace(config.train, seq_length=67))
    (one,) = ranks(1).run(gradients, config)
    layout = Layout(cp=4, cp_cut=kind)
    assert_same_gradients(ranks(4).run(gradients, replace(config, parallel=layout)), one)


def losses_of_tokens(config: RunConfig, row: PackedRow) -> Tensor | None:
    """[T] losses in the order of the whole row, on the last pipeline stage."""
    run = start(config)
    layout = config.parallel
    if layout.cp > 1:
        row = row.cut(layout.cp, parallel_state.get_context_parallel_rank(), layout.cp_cut)
    with torch.no_grad():
        found = run_schedule(
            run.chunks, [row], lambda out, row: out[0], forward_only=True, forward=forward_row
        )
    if not found or not row.shard:
        return found[0] if found else None
    group = parallel_state.get_context_parallel_group()
    parts = [torch.empty_like(found[0]) for _ in range(layout.cp)]
    dist.all_gather(parts, found[0], group=group)
    return row.shard.cut.join(parts)


def of_first_document_changed(config: RunConfig) -> tuple[Tensor, Tensor] | None:
    """Losses of a row, and with its first document changed."""
    tokens = torch.arange(48) * 7 % 61
    rows = [PackedRow.from_documents((start + tokens).split([13, 1, 34])) for start in (0, 1)]
    rows[1].tokens[13:] = rows[0].tokens[13:]
    rows[1].labels[13:] = rows[0].labels[13:]
    before, after = (losses_of_tokens(config, row) for row in rows)
    return None if before is None or after is None else (before, after)


@pytest.mark.parametrize("name", ["pp4", "cp2_pp2"])
def test_no_document_sees_another_in_any_stage(
    name: str, ranks: Callable[[int], Pool], prefix: str
) -> None:
    _, layout = LAYOUTS[name]
    config = small_config("unused", prefix, parallel=layout)
    found = [losses for losses in ranks(4).run(of_first_document_changed, config) if losses]
    assert len(found) == layout.cp
    for before, after in found:
        assert torch.equal(before[13:], after[13:])
        assert (before[:12] != after[:12]).all()


def masked_tail(config: RunConfig) -> tuple[float, float]:
    """Loss and gradient norm of a step whose rows hold five tokens each, then padding."""
    run = start(config)
    documents = [torch.arange(start, start + 5) for start in range(4)]
    rows = [PackedRow.from_documents([document], pad_to=64) for document in documents]
    run.reader.sample = lambda index: rows[index % 4]  # type: ignore[method-assign]
    result = train_step(run)
    return result.loss, result.grad_norm


def test_ranks_without_a_trained_token_are_finite(
    ranks: Callable[[int], Pool], prefix: str
) -> None:
    config = small_config("unused", prefix)
    (one,) = ranks(1).run(masked_tail, config)
    layout = Layout(cp=4, cp_cut="contiguous")
    for result in ranks(4).run(masked_tail, replace(config, parallel=layout)):
        assert result == pytest.approx(one, rel=1e-5)


def logits_of_a_prompt(config: RunConfig) -> Tensor:
    run = start(config)
    row = PackedRow.from_documents([torch.arange(8)])
    return forward_rows(
        run.chunks, [row], lambda out, row: out[0, -1], MODEL.vocab_size, with_loss=False
    )


@pytest.mark.parametrize("name", ["cp2", "cp2_pp2"])
def test_each_rank_can_take_a_whole_row_in_inference(
    name: str, ranks: Callable[[int], Pool], prefix: str
) -> None:
    config = small_config("unused", prefix)
    (one,) = ranks(1).run(logits_of_a_prompt, config)
    size, layout = LAYOUTS[name]
    for logits in ranks(size).run(logits_of_a_prompt, replace(config, parallel=layout)):
        torch.testing.assert_close(logits, one)


def test_the_record_holds_the_imbalance_of_cut_rows() -> None:
    row = PackedRow.from_documents([torch.arange(1000)])
    parts = [row.cut(2, 0, kind) for kind in ("contiguous", "zigzag")]
    assert cut_balance([row]) == {}
    assert cut_balance(parts)["perf/cp_imbalance"] == pytest.approx(1.25, abs=1e-3)
