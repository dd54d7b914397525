"""Imported weights through training in many processes, and out to transformers again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MiniMaxForCausalLM

from megatron_m1.checkpoint import starting, store
from megatron_m1.checkpoint.mapping import mapped_parameters
from megatron_m1.config import RunConfig
from megatron_m1.conversion.logits import our_logits, some_tokens
from megatron_m1.errors import InputError
from megatron_m1.model.config import ModelConfig
from megatron_m1.pretrain import pretrain
from megatron_m1.training.step import train_step
from parallel.layout import Layout
from tests.conversion.foreign import (
    WHOLE,
    assert_equal,
    export_checkpoint,
    import_folder,
    parameters_of,
    write_toy,
)
from tests.distributed import Pool
from tests.training.small_run import (
    LAYOUTS,
    small_config,
    start,
    weight_parts,
    whole_weights,
    write_data,
)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that transformers wrote, as our checkpoint."""
    folder = tmp_path_factory.mktemp("imported")
    return import_folder(write_toy(folder / "toy"), folder / "checkpoint")


def config_of(folder: Path, prefix: str, layout: Layout, **model: Any) -> RunConfig:
    return small_config(str(folder), prefix, parallel=layout, model=replace(WHOLE, **model))


def trained(config: RunConfig, checkpoint: Path) -> dict[str, Any]:
    """Begin with imported weights, take a step and save."""
    run = start(config)
    starting.start(run, checkpoint)
    before = weight_parts(run)
    train_step(run)
    return {"weights": before, "after": weight_parts(run), "saved": store.save(run)}


def whole(results: list[dict[str, Any]], when: str) -> dict[str, Tensor]:
    """The parameters that the ranks hold together, each as Megatron would keep it whole."""
    parts = whole_weights([{"weights": result[when]} for result in results])
    mapped = mapped_parameters(WHOLE)
    return {name: mapped[name].operation.flat(packed) for name, packed in parts.items()}


@pytest.mark.parametrize("name", ["tp2_pp2_ep2", "etp2_ep2", "pp2_interleaved", "one_process"])
def test_import_train_export(
    name: str,
    ranks: Callable[[int], Pool],
    single_process: Layout,
    prefix: str,
    imported: Path,
    tmp_path: Path,
) -> None:
    size, layout = LAYOUTS.get(name, (1, Layout()))
    results = ranks(size).run(trained, config_of(tmp_path, prefix, layout), imported)
    assert_equal(whole(results, "weights"), parameters_of(imported))
    saved = results[0]["saved"]
    assert_equal(whole(results, "after"), parameters_of(saved))

    folder = export_checkpoint(saved, tmp_path / "hf", "transformers", like=imported.parent / "toy")
    hf, info = MiniMaxForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    rows = some_tokens(WHOLE)
    ours = our_logits(saved, rows)
    assert not torch.allclose(ours[0], our_logits(imported, rows)[0], atol=1e-2)
    with torch.no_grad():
        for row, logits in zip(rows, ours, strict=True):
            torch.testing.assert_close(hf(row[None]).logits[0], logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_from_imported_weights_is_new(
    precision: str, single_process: Layout, prefix: str, imported: Path, tmp_path: Path
) -> None:
    """Step 0, fresh moments, and master weights that are the imported ones."""
    config = config_of(tmp_path, prefix, Layout())
    run = start(replace(config, train=replace(config.train, precision=precision)))
    text = starting.start(run, imported)
    assert text == f"{imported}: a new run from imported weights"
    assert run.progress.step == 0
    loaded = parameters_of(imported)
    for name, (_, _, part) in weight_parts(run).items():
        torch.testing.assert_close(
            part.float().reshape(-1), loaded[name].to(part.dtype).float().reshape(-1)
        )
    loss = train_step(run).loss
    assert loss == pytest.approx(_loss(config, imported), rel=1e-2)
    # Where the masters were still those of a fresh start, the step would have brought those.
    moved = max(
        (part.float().reshape(-1) - loaded[name].reshape(-1)).abs().max().item()
        for name, (_, _, part) in weight_parts(run).items()
    )
    assert 0 < moved < 0.1


def _loss(config: RunConfig, imported: Path) -> float:
    run = start(config)
    starting.start(run, imported)
    return train_step(run).loss


def test_the_command_starts_from_them_and_goes_on_from_its_own(
    single_process: Layout,
    prefix: str,
    imported: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = config_of(tmp_path, prefix, Layout())
    load = replace(config.checkpoint, load=str(imported))
    config = replace(config, checkpoint=load, train=replace(config.train, steps=1))
    assert pretrain(config).progress.step == 1
    assert f"{imported}: a new run from imported weights" in capsys.readouterr().out
    longer = replace(config, train=replace(config.train, steps=2))
    assert pretrain(longer).progress.step == 2
    assert "step_000001: going on from step 1" in capsys.readouterr().out


def test_weights_of_another_model_are_refused(
    single_process: Layout, prefix: str, imported: Path, tmp_path: Path
) -> None:
    other: dict[str, ModelConfig] = {"model": replace(WHOLE, rotary_dim=8, rope_theta=5e5)}
    run = start(replace(config_of(tmp_path, prefix, Layout()), **other))
    with pytest.raises(InputError, match="rotary_dim=8 here, 16 there") as refused:
        starting.start(run, imported)
    assert "rope_theta" not in str(refused.value)


def test_another_base_of_rotation_is_said(
    single_process: Layout, prefix: str, imported: Path, tmp_path: Path
) -> None:
    longer = replace(config_of(tmp_path, prefix, Layout()), model=replace(WHOLE, rope_theta=5e5))
    said = starting.start(start(longer), imported)
    assert "another base of rotation: model.rope_theta=500000.0 here, 10000.0 there" in said
