"""A checkpoint of any layout loads in any other, from more processes to fewer and back: weights and
moments bit for bit, the position in the data, and the losses of the next steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_m1.checkpoint import store
from megatron_m1.checkpoint.state import sharded_training
from megatron_m1.checkpoint.unpickling import read_metadata
from megatron_m1.config import CheckpointConfig, RunConfig
from megatron_m1.training.run import Run
from megatron_m1.training.state import Progress
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
STEP = "step_000001"
WHOLE = "whole.pt"
"""A checkpoint's tensors put together, beside its folder."""


@dataclass(frozen=True)
class Source:
    """A checkpoint after a step of a layout, and what its run had then and later.

    Attributes:
        state: the position in the data and all else that is no tensor.
    """

    path: Path
    losses: list[float]
    weights: dict[str, Tensor]
    stored: dict[str, Tensor]
    state: dict[str, Any]


def config_of(name: str, folder: Path, prefix: str) -> RunConfig:
    config = small_config(str(folder), prefix, parallel=ALL[name][1])
    return replace(config, checkpoint=CheckpointConfig(dir=str(folder)))


def two_losses(run: Run) -> list[float]:
    return [train_step(run).loss for _ in range(2)]


def saved(config: RunConfig) -> dict[str, Any]:
    run = start(config)
    train_step(run)
    store.save(run)
    weights, state = weight_parts(run), run.state_dict()
    return {"weights": weights, "state": state, "losses": two_losses(run)}


def loaded(
    config: RunConfig, paths: dict[str, Path], sample: str | None = None
) -> dict[str, dict[str, Any]]:
    """For each checkpoint what this rank then holds (its parts are compared here). The ``sample``
    is saved again, and training goes on from it."""
    run = start(config)
    results = {}
    for name, path in paths.items():
        forget(run)
        store.load(run, path)
        whole = torch.load(path.parent / WHOLE, weights_only=True)
        results[name] = {"held": held(run, whole), "state": run.state_dict()}
        if name == sample:
            store.save(run)
            results[name] |= {"weights": weight_parts(run), "losses": two_losses(run)}
    return results


@torch.no_grad()
def forget(run: Run) -> None:
    """Nothing that a load must bring is there before."""
    for chunk in run.chunks:
        for parameter in chunk.parameters():
            parameter.fill_(torch.nan)
    for part in run.optimizer.chained_optimizers:
        for parameter, state in part.optimizer.state.items():
            for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"]):
                tensor.fill_(torch.nan)


def held(run: Run, whole: dict[str, Tensor]) -> Counter[str]:
    """How many numbers of each tensor this rank holds on behalf of its copies; each is compared
    with its place in the whole."""
    count: Counter[str] = Counter()
    for shard in shards(run):
        expected = whole[shard.key][shard.global_slice()]
        assert shard.data is not None and torch.equal(shard.data, expected), shard.key
        if not any(shard.replica_id):
            count[shard.key] += shard.data.numel()
    return count


def shards(run: Run) -> Iterator[Any]:
    state = sharded_training(run, is_loading=False)
    apply_factories(state)
    return (value for value in nested_values(state) if isinstance(value, ShardedTensor))


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
        path, first = folder / STEP, results[0]
        stored = stored_tensors(path)
        torch.save(stored, folder / WHOLE)
        found[name] = Source(path, first["losses"], whole_weights(results), stored, first["state"])
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


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
    for name, source in sources.items():
        results = [results[name] for results in by_rank]
        together = sum((result["held"] for result in results), Counter())
        assert together == {key: tensor.numel() for key, tensor in source.stored.items()}
        assert all(result["state"] == source.state for result in results)
    source, results = sources[sample], [results[sample] for results in by_rank]
    assert_equal(whole_weights(results), source.weights)
    assert_equal(stored_tensors(tmp_path / STEP), source.stored)
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

    def whole(folder: Path) -> dict[str, Path]:
        torch.save(stored_tensors(folder / STEP), folder / WHOLE)
        return {"again": folder / STEP}

    first, there, back = tmp_path / "pp2", tmp_path / "tp2", tmp_path / "back"
    ranks(2).run(saved, bf16("pp2", first))
    ranks(2).run(loaded, bf16("tp2", there), whole(first), "again")
    ranks(2).run(loaded, bf16("pp2", back), whole(there), "again")
    for folder in (there, back):
        assert_equal(stored_tensors(folder / STEP), stored_tensors(first / STEP))


def test_the_matrix_has_moments(sources: dict[str, Source]) -> None:
    for source in sources.values():
        kinds = {name.split(".")[2] for name in source.stored if name.startswith("optimizer.")}
        assert kinds == {"param", "exp_avg", "exp_avg_sq"}
        weights = {name for name in source.stored if not name.startswith("optimizer.")}
        assert len(source.stored) == 4 * len(weights)
        assert all(tensor.isfinite().all() for tensor in source.stored.values())
        assert source.state["progress"] == asdict(Progress(step=1, tokens=256))
