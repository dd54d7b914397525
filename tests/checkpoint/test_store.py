"""What lies in a folder of checkpoints, what is found there, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from megatron.core import dist_checkpointing

from megatron_m1.checkpoint import store
from megatron_m1.config import RunConfig
from megatron_m1.errors import InputError
from megatron_m1.training.run import Progress, Run
from megatron_m1.training.step import train_step
from parallel.layout import Layout
from tests.training.small_run import MODEL, small_config, start, write_data


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, prefix: str, single_process: Layout) -> Run:
    """A run with a checkpoint after its first step."""
    run = start(small_config(str(tmp_path_factory.mktemp("runs") / "run"), prefix))
    train_step(run)
    store.save(run)
    return run


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    """The same with a folder of its own."""
    shutil.copytree(trained.dir, tmp_path / "run")
    progress = Progress(step=1, tokens=trained.progress.tokens)
    return replace(
        trained, config=replace(trained.config, run_dir=str(tmp_path / "run")), progress=progress
    )


@pytest.fixture
def config(run: Run) -> RunConfig:
    return run.config


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_each_save_is_a_folder_and_the_newest_is_named(run: Run) -> None:
    train_step(run)
    assert store.save(run) == run.checkpoint_dir / "step_000002"
    assert names(run.checkpoint_dir) == {"step_000001", "step_000002", "latest"}
    assert (run.checkpoint_dir / "latest").read_text() == "step_000002"


def test_saving_a_step_again_replaces_it(run: Run) -> None:
    stale = run.checkpoint_dir / "step_000001" / "stale"
    stale.touch()
    store.save(run)
    assert not stale.exists()
    assert names(run.checkpoint_dir) == {"step_000001", "latest"}


def test_an_interrupted_save_leaves_the_last_whole_one(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = dist_checkpointing.save

    def break_off(state: dict[str, Any], folder: str, *args: Any, **kwargs: Any) -> None:
        write(state, folder, *args, **kwargs)
        raise OSError("no space left on device")

    train_step(run)
    with monkeypatch.context() as patched:
        patched.setattr(dist_checkpointing, "save", break_off)
        with pytest.raises(OSError, match="no space"):
            store.save(run)
    assert names(run.checkpoint_dir) == {"step_000001", "step_000002.tmp", "latest"}
    found = store.find_latest(run.checkpoint_dir)
    assert found == run.checkpoint_dir / "step_000001"
    store.load(run, found)
    assert run.progress.step == 1
    # The next save clears what the broken one left.
    train_step(run)
    store.save(run)
    assert names(run.checkpoint_dir) == {"step_000001", "step_000002", "latest"}


def test_a_save_killed_between_its_two_moves_is_survived(run: Run) -> None:
    step = run.checkpoint_dir / "step_000001"
    step.rename(step.with_suffix(".old"))
    found = store.find_latest(run.checkpoint_dir)
    assert found == step.with_suffix(".old")
    store.load(run, found)


def test_a_checkpoint_is_found_by_each_of_its_folders(run: Run) -> None:
    step = run.checkpoint_dir / "step_000001"
    for folder in (run.dir, run.checkpoint_dir, step):
        assert store.find(str(folder)) == step
    assert store.find(None) is None
    with pytest.raises(InputError, match="checkpoint.load=.*nowhere holds no checkpoint"):
        store.find(str(run.dir / "nowhere"))


def test_a_dangling_pointer_does_not_start_training_anew(run: Run) -> None:
    shutil.rmtree(run.checkpoint_dir / "step_000001")
    with pytest.raises(InputError, match="latest names step_000001"):
        store.find_latest(run.checkpoint_dir)


def test_a_restarted_run_goes_on_from_its_own_checkpoints(run: Run, tmp_path: Path) -> None:
    step = run.checkpoint_dir / "step_000001"
    other, nothing = tmp_path / "other", tmp_path / "nothing"
    shutil.copytree(run.dir, other)
    assert store.choose(None, run.checkpoint_dir) == step
    assert store.choose(None, nothing) is None
    assert store.choose(str(other), nothing) == other / "checkpoints" / "step_000001"
    assert store.choose(str(other), run.checkpoint_dir) == step


def test_an_own_step_that_is_asked_for_goes_before_the_latest(run: Run) -> None:
    first = run.checkpoint_dir / "step_000001"
    train_step(run)
    store.save(run)
    assert store.choose(str(first), run.checkpoint_dir) == first


def test_another_model_is_refused_by_its_keys(run: Run, config: RunConfig) -> None:
    path = store.find_latest(run.checkpoint_dir)
    assert path is not None
    other = replace(MODEL, head_dim=8, rotary_dim=4, aux_loss_coef=0.5)
    with pytest.raises(InputError) as refused:
        store.load(start(replace(config, model=other)), path)
    assert "model.head_dim=8 (the checkpoint has 16)" in str(refused.value)
    assert "model.rotary_dim=4 (the checkpoint has 8)" in str(refused.value)
    assert "aux_loss_coef" not in str(refused.value)


def test_other_data_is_refused(run: Run, config: RunConfig) -> None:
    path = store.find_latest(run.checkpoint_dir)
    assert path is not None
    with pytest.raises(InputError, match="seed 1234, this run has 7"):
        store.load(start(replace(config, seed=7)), path)


def test_the_other_optimizer_is_refused(run: Run, config: RunConfig) -> None:
    path = store.find_latest(run.checkpoint_dir)
    assert path is not None
    plain = replace(config, optim=replace(config.optim, distributed=False))
    with pytest.raises(InputError, match="optim.distributed=true"):
        store.load(start(plain), path)


def test_hyperparameters_are_the_configurations(run: Run, config: RunConfig) -> None:
    path = store.find_latest(run.checkpoint_dir)
    assert path is not None
    optim = replace(config.optim, betas=[0.8, 0.99], eps=1e-5, weight_decay=0.5)
    resumed = start(replace(config, optim=optim))
    store.load(resumed, path)
    for group in resumed.optimizer.param_groups:
        assert (tuple(group["betas"]), group["eps"]) == ((0.8, 0.99), 1e-5)
        assert group["weight_decay"] == 0.5 * group["wd_mult"]


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_checkpoint_is_one_sentence(run: Run, damage: str) -> None:
    path = store.find_latest(run.checkpoint_dir)
    assert path is not None
    (tensors,) = path.glob("*.distcp")
    if damage == "missing":
        tensors.unlink()
    else:
        tensors.write_bytes(tensors.read_bytes()[:1000])
    with pytest.raises(InputError) as refused:
        store.load(start(run.config), path)
    assert str(refused.value).startswith(f"checkpoint {path} cannot be read, a file")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_a_configuration_that_is_none_is_refused(run: Run) -> None:
    path = store.find_latest(run.checkpoint_dir)
    assert path is not None
    (path / "config.json").write_text(json.dumps({"model": {"layers": 3}}))
    with pytest.raises(InputError, match="does not describe a model: unknown key model.layers"):
        store.saved_model(path)
    (path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as a configuration"):
        store.saved_model(path)
