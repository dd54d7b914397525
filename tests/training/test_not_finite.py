"""A loss or gradient that is not finite, on one process of two: nobody updates, and it is told."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_m1.config import RunConfig
from megatron_m1.errors import EXIT_NOT_FINITE, NotFinite
from megatron_m1.model.build import unwrap
from megatron_m1.training.callbacks.callback import Callback as Beside
from megatron_m1.training.callbacks.defaults import default_callbacks
from megatron_m1.training.loop import train
from megatron_m1.training.run import Run
from megatron_m1.training.step import train_step
from parallel.layout import Layout
from tests.distributed import Pool
from tests.training.small_run import small_config, start, weight_parts, write_data

LAYOUTS: dict[str, tuple[Layout, bool]] = {
    "sharded_optimizer": (Layout(), True),
    "dp2": (Layout(), False),
    "tp2": (Layout(tp=2), True),
    "pp2": (Layout(pp=2), True),
    "ep2": (Layout(ep=2), True),
}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def config_of(folder: Path, prefix: str, name: str = "dp2", **train: Any) -> RunConfig:
    layout, distributed = LAYOUTS[name]
    config = small_config(str(folder), prefix, parallel=layout)
    return replace(
        config,
        optim=replace(config.optim, distributed=distributed),
        train=replace(config.train, **train),
    )


def spoil_gradient(run: Run, value: float) -> None:
    """Let the gradient of one weight of this process be ``value`` in the next backward pass."""
    weight = unwrap(run.chunks[0]).decoder.layers[0].mlp.router.weight

    def spoil(gradient: Tensor) -> Tensor:
        once.remove()
        return torch.full_like(gradient, value)

    once = weight.register_hook(spoil)


def spoil_loss(run: Run) -> None:
    """Let this process's loss be NaN in the next forward pass, without a trace in the gradient."""

    def first(module: Any, inputs: Any, output: Tensor) -> Tensor:
        once.remove()
        return output + (output.detach() * math.nan)

    once = run.chunks[-1].register_forward_hook(first)


def moments(run: Run) -> list[Tensor]:
    parts = run.optimizer.chained_optimizers
    return [
        value.clone()
        for part in parts
        for state in part.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    ]


def skipped(config: RunConfig, kind: str) -> dict[str, Any]:
    """Two steps, and a third that is spoiled on the second process."""
    run = start(config)
    train_step(run), train_step(run)
    before, state = weight_parts(run), moments(run)
    if os.environ["RANK"] == "1":
        spoil_loss(run) if kind == "loss" else spoil_gradient(run, float(kind))
    result = train_step(run)
    after = weight_parts(run)
    same = all(torch.equal(after[name][2], part) for name, (_, _, part) in before.items())
    same &= all(torch.equal(*pair) for pair in zip(moments(run), state, strict=True))
    fourth = train_step(run)
    return {
        "unchanged": same,
        "finite": (result.is_finite, fourth.is_finite),
        "loss": result.loss,
        "norm": result.grad_norm,
        "progress": run.progress,
        "consumed": run.reader.consumed,
    }


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "nan") for name in LAYOUTS), ("sharded_optimizer", "inf")]
)
def test_all_skip_the_update_of_a_gradient_that_is_wrong_on_one(
    name: str, kind: str, ranks: Callable[[int], Pool], prefix: str
) -> None:
    results = ranks(2).run(skipped, config_of(Path("unused"), prefix, name), kind)
    for result in results:
        assert result["unchanged"]
        assert result["finite"] == (False, True)
        assert math.isfinite(result["loss"])
        assert not math.isfinite(result["norm"])
        assert (result["progress"].step, result["consumed"]) == (4, 16)
        assert (result["progress"].skipped, result["progress"].skipped_in_a_row) == (1, 0)


def test_all_skip_where_only_the_loss_is_wrong(ranks: Callable[[int], Pool], prefix: str) -> None:
    for result in ranks(2).run(skipped, config_of(Path("unused"), prefix), "loss"):
        assert result["unchanged"]
        assert result["finite"] == (False, True)
        assert math.isnan(result["loss"])


def disagreeing(config: RunConfig) -> bool:
    """Whether this process updates when its device alone gets the norm wrong."""
    run = start(config)
    if os.environ["RANK"] == "1":
        run.optimizer.get_grad_norm = lambda: math.inf
    return train_step(run).is_finite


def test_what_one_device_gets_wrong_counts_for_all(
    ranks: Callable[[int], Pool], prefix: str
) -> None:
    assert ranks(2).run(disagreeing, config_of(Path("unused"), prefix)) == [False, False]


class Spoiler(Beside[Run]):
    """Spoils the loss of some steps on the second process."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps

    def before_step(self, run: Run) -> None:
        if run.progress.step + 1 in self.steps and os.environ["RANK"] == "1":
            spoil_loss(run)


def trained(config: RunConfig, steps: set[int]) -> tuple[int, str]:
    """The last step, and the words of the end."""
    run = start(config)
    run.open_sinks()
    try:
        train(run, [*default_callbacks(run), Spoiler(steps)])
    except NotFinite as error:
        return run.progress.step, str(error)
    finally:
        run.sinks.close()
    return run.progress.step, "trained to the end"


def test_a_run_ends_after_too_many_in_a_row_and_leaves_what_it_saw(
    ranks: Callable[[int], Pool], prefix: str, tmp_path: Path
) -> None:
    config = config_of(tmp_path, prefix, steps=9, max_skipped=1)
    # One alone may be skipped, and again after a good one.
    for step, words in ranks(2).run(trained, config, {2, 4, 5}):
        assert step == 5
        assert words.startswith("step 5: loss nan, gradient norm ")
        assert words.endswith(f"look at {tmp_path}/not_finite/step_000005")
    assert not (tmp_path / "checkpoints").exists()
    found = [
        json.loads((tmp_path / f"not_finite/step_000005/rank_0000{rank}.json").read_text())
        for rank in range(2)
    ]
    assert [len(each["micro_batches"]) for each in found] == [2, 2]
    assert [each["micro_batches"][0]["loss"] for each in found] == [pytest.approx(3, abs=2), "nan"]
    assert {len(each["tokens"]) for dumped in found for each in dumped["micro_batches"]} == {64}
    norms = found[0]["parameters"]["model0.decoder.final_layernorm.weight"]
    assert norms["weight"] == pytest.approx(32**0.5, rel=0.1)
    assert norms["gradient"] > 0


def test_the_record_counts_and_names_skipped_steps(
    ranks: Callable[[int], Pool], prefix: str, tmp_path: Path
) -> None:
    config = config_of(tmp_path, prefix, steps=4)
    assert ranks(2).run(trained, config, {2}) == [(4, "trained to the end")] * 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    steps = [line for line in lines if "train/loss" in line]
    assert [line["optim/skipped"] for line in steps] == [0, 1, 1, 1]
    assert [line["train/loss"] == "nan" for line in steps] == [False, True, False, False]
    texts = {name: text for line in lines for name, text in line.get("text", {}).items()}
    assert texts["skipped"].startswith("step 2: loss nan, gradient norm ")


def test_the_count_goes_on_after_a_restart(
    ranks: Callable[[int], Pool], prefix: str, tmp_path: Path
) -> None:
    config = config_of(tmp_path, prefix, steps=3)
    ranks(2).run(trained, config, {3})
    config = config_of(tmp_path, prefix, steps=5, max_skipped=1)
    for step, words in ranks(2).run(resumed, config, {4}):
        assert (step, words[:12]) == (4, "step 4: loss")


def resumed(config: RunConfig, steps: set[int]) -> tuple[int, str]:
    from megatron_m1.training.beginning import begin

    run = start(config)
    assert begin(run)
    try:
        train(run, [Spoiler(steps)])
    except NotFinite as error:
        return run.progress.step, str(error)
    finally:
        run.sinks.close()
    return run.progress.step, "trained to the end"


def test_the_program_ends_with_a_code_of_its_own(prefix: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "megatron_m1.pretrain", "model=tiny", "data=indexed"),
            *("model.num_layers=2", "model.layer_pattern=LS", "model.vocab_size=64"),
            *(f"data.train=[{prefix}]", "logger=quiet", "train.seq_length=64", "train.steps=9"),
            *("train.report=false", "fault=[nan_loss@2]", "train.max_skipped=0"),
            f"run_dir={tmp_path}/run",
        ],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == EXIT_NOT_FINITE, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: step 2: loss nan, gradient norm nan: nothing is saved after it")
    assert last.endswith(f"look at {tmp_path}/run/not_finite/step_000002")
