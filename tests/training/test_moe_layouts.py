"""What the experts' losses and capacity train does not depend on the layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

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

# Coefficients far above those of training, so that the losses make most of the gradient.
CASES: dict[str, dict[str, Any]] = {
    "losses": {"aux_loss_coef": 1.0, "z_loss_coef": 0.1},
    "probs": {"capacity_factor": 0.8, "drop_policy": "probs", "capacity_scope": "micro_batch"},
    "position": {
        "capacity_factor": 0.8,
        "drop_policy": "position",
        "capacity_scope": "micro_batch",
    },
}
WATCHED = ("train/loss", "optim/grad_norm", "train/aux_loss", "train/z_loss", "moe/drop_frac")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def curves(prefix: str, layout: Layout) -> dict[str, list[float]]:
    """The watched metrics of three steps, one list for each case."""
    from megatron_m1.training.metrics import step_metrics

    found: dict[str, list[float]] = {}
    for case, model in CASES.items():
        config = small_config("unused", prefix, parallel=layout, model=replace(MODEL, **model))
        run = start(replace(config, train=replace(config.train, steps=3)))
        found[case] = []
        while not run.finished:
            metrics: dict[str, Any] = step_metrics(run, train_step(run), 1.0)
            found[case] += [metrics[name] for name in WATCHED if name in metrics]
    return found


@pytest.fixture(scope="module")
def one_process(ranks: Callable[[int], Pool], prefix: str) -> dict[str, list[float]]:
    return ranks(1).run(curves, prefix, Layout())[0]


@pytest.mark.parametrize(
    "name", ["dp2", "ep2", "tp2", "tp2_sp", "pp2", "etp2_ep2", "cp2", "cp2_tp2", "cp4_ep2"]
)
def test_layout_follows_one_process(
    name: str, ranks: Callable[[int], Pool], prefix: str, one_process: dict[str, list[float]]
) -> None:
    size, layout = LAYOUTS[name]
    for result in ranks(size).run(curves, prefix, layout):
        for case, expected in one_process.items():
            # With context parallelism the order of the ranks is not that of the row.
            if case != "position" or layout.cp == 1:
                assert result[case] == pytest.approx(expected, rel=1e-6, abs=1e-9), case


def test_the_cases_are_told_apart(one_process: dict[str, list[float]]) -> None:
    per_step = {case: len(values) // 3 for case, values in one_process.items()}
    assert per_step == {"losses": 5, "probs": 4, "position": 4}
    assert one_process["losses"][4] == 0
    assert one_process["probs"][3] > 0.15
    assert one_process["probs"] != one_process["position"]


def summed_gradients(prefix: str, rows: list[PackedRow]) -> dict[str, Tensor]:
    """Gradients of one step with a micro-batch for each row, times its trained tokens."""
    model = replace(MODEL, **CASES["losses"])
    config = small_config("unused", prefix, model=model)
    optim = replace(config.optim, distributed=False, clip_grad=0.0)
    train = replace(config.train, global_batch=len(rows))
    run = start(replace(config, optim=optim, train=train))
    run.reader.sample = lambda index: rows[index]  # type: ignore[method-assign]
    train_step(run)
    tokens = sum(row.loss_mask.sum() for row in rows)
    parts = weight_parts(run, lambda weight: weight.main_grad * tokens)
    return whole_weights([{"weights": parts}])


def accumulated_and_alone(prefix: str) -> list[dict[str, Tensor]]:
    """Gradients of three rows in one step, and of a step for each of them."""
    documents = torch.randint(MODEL.vocab_size, (3, 64), generator=torch.manual_seed(0))
    rows = [
        PackedRow.from_documents([document[:length]], pad_to=64)
        for document, length in zip(documents, (64, 20, 5), strict=True)
    ]
    return [summed_gradients(prefix, some) for some in (rows, *([row] for row in rows))]


def test_gradients_of_the_losses_add_up_over_micro_batches(
    ranks: Callable[[int], Pool], prefix: str
) -> None:
    ((together, *alone),) = ranks(1).run(accumulated_and_alone, prefix)
    for name, gradient in together.items():
        expected = torch.stack([one[name] for one in alone]).sum(dim=0)
        atol = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=atol, msg=name)
