"""A checkpoint of any layout loads in any other, from more processes to fewer and back: weights and
moments bit for bit, the position in the data, and the losses of the next steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_m1.checkpoint import store
from megatron_m1.checkpoint.unpickling import read_common, read_metadata
from megatron_m1.config import CheckpointConfig, RunConfig
from megatron_m1.training.run import Run
from megatron_m1.training.step import train_step
from parallel.layout import Layout
from tests.distributed import Pool
from tests.training.small_run import LAYOUTS, small_config, start, weight_parts, whole_weights

NAMES = (
    *("tp2", "pp2", "pp2_interleaved", "pp2_uneven", "ep2", "dp2"),
    *("etp2_ep2", "cp2", "tp2_pp2_ep2"),
)
ALL: dict[str, tuple[int, Layout]] = {
    "one": (1, Layout()),
    **{name: LAYOUTS[name] for name in NAMES},
}


@dataclass(frozen=True)
class Source:
    """A checkpoint after two steps of a layout, and what its run had then and later."""

    path: Path
    losses: list[float]
    weights: dict[str, Tensor]
    stored: dict[str, Tensor]


def config_of(name: str, folder: Path, prefix: str) -> RunConfig:
    config = small_config(str(folder), prefix, parallel=ALL[name][1])
    return replace(config, checkpoint=CheckpointConfig(dir=str(folder)))


def two_losses(run: Run) -> list[float]:
    return [train_step(run).loss for _ in range(2)]


def saved(config: RunConfig) -> dict[str, Any]:
    run = start(config)
    two_losses(run)
    store.save(run)
    weights = weight_parts(run)
    return {"weights": weights, "losses": two_losses(run)}


def loaded(config: RunConfig, paths: dict[str, Path], sample: str) -> list[dict[str, Any]]:
    """For each checkpoint the weights that it gives; it is saved again under the same name. With
    the ``sample``, training goes on."""
    run = start(config)
    results = []
    for name, path in paths.items():
        store.load(run, path)
        checkpoint = replace(config.checkpoint, dir=f"{config.checkpoint.dir}/{name}")
        again = replace(run, config=replace(config, checkpoint=checkpoint))
        store.save(again)
        results.append({"weights": weight_parts(run)})
        if name == sample:
            results[-1]["losses"] = two_losses(run)
    return results


def stored_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole."""
    wanted: dict[str, Any] = {
        name: torch.full(entry.size, torch.nan, dtype=entry.properties.dtype)
        for name, entry in read_metadata(path).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    torch_checkpoint.load(wanted, checkpoint_id=path, no_dist=True)
    return wanted


@pytest.fixture(scope="module")
def sources(
    ranks: Callable[[int], Pool], prefix: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Source]:
    found = {}
    for name, (size, _) in ALL.items():
        folder = tmp_path_factory.mktemp(name)
        results = ranks(size).run(saved, config_of(name, folder, prefix))
        path = folder / "step_000002"
        weights = whole_weights(results)
        found[name] = Source(path, results[0]["losses"], weights, stored_tensors(path))
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("target", ALL)
def test_every_layout_loads_every_other(
    target: str,
    sources: dict[str, Source],
    ranks: Callable[[int], Pool],
    prefix: str,
    tmp_path: Path,
) -> None:
    size, _ = ALL[target]
    sample = [*ALL][([*ALL].index(target) + 3) % len(ALL)]
    paths = {name: source.path for name, source in sources.items()}
    by_rank = ranks(size).run(loaded, config_of(target, tmp_path, prefix), paths, sample)
    for number, (name, source) in enumerate(sources.items()):
        results = [results[number] for results in by_rank]
        assert_equal(whole_weights(results), source.weights)
        again = tmp_path / name / "step_000002"
        assert_equal(stored_tensors(again), source.stored)
        common, expected = read_common(again), read_common(source.path)
        assert common["progress"] == expected["progress"] == {"step": 2, "tokens": 512}
        assert common["reader"] == expected["reader"]
        if name == sample:
            for result in results:
                assert result["losses"] == pytest.approx(source.losses, rel=1e-5)


def test_weights_of_two_precisions_change_layout(
    ranks: Callable[[int], Pool], prefix: str, tmp_path: Path
) -> None:
    """In bf16 the router and the head are FP32, in groups of the optimizer of their own, of which
    not every pipeline stage has the same."""

    def bf16(name: str, folder: Path) -> RunConfig:
        config = config_of(name, folder, prefix)
        return replace(config, train=replace(config.train, precision="bf16"))

    ranks(2).run(saved, bf16("pp2", tmp_path / "pp2"))
    path = tmp_path / "pp2" / "step_000002"
    ranks(2).run(loaded, bf16("tp2", tmp_path / "tp2"), {"again": path}, "")
    there = tmp_path / "tp2" / "again" / "step_000002"
    ranks(2).run(loaded, bf16("pp2", tmp_path / "back"), {"again": there}, "")
    for again in (there, tmp_path / "back" / "again" / "step_000002"):
        assert_equal(stored_tensors(again), stored_tensors(path))


def test_the_matrix_has_moments(sources: dict[str, Source]) -> None:
    for source in sources.values():
        kinds = {name.split(".")[2] for name in source.stored if name.startswith("optimizer.")}
        assert kinds == {"param", "exp_avg", "exp_avg_sq"}
        weights = {name for name in source.stored if not name.startswith("optimizer.")}
        assert len(source.stored) == 4 * len(weights)
        assert not any(tensor.isnan().any() for tensor in source.stored.values())
