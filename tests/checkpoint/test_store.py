"""What a checkpoint gives back, and to which runs."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import tensor_parallel

from megatron_m1.checkpoint import store
from megatron_m1.checkpoint.models import saved_model
from megatron_m1.config import RunConfig
from megatron_m1.errors import InputError
from megatron_m1.training.run import Run
from megatron_m1.training.step import train_step
from tests.checkpoint.spoil import names
from tests.training.small_run import MODEL, start


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


def test_another_model_is_refused_by_its_keys(run: Run, config: RunConfig) -> None:
    path = run.checkpoint_dir / "step_000001"
    other = replace(MODEL, head_dim=8, rotary_dim=4, aux_loss_coef=0.5)
    with pytest.raises(InputError) as refused:
        store.load(start(replace(config, model=other)), path)
    assert "model.head_dim=8 here, 16 there" in str(refused.value)
    assert "model.rotary_dim=4 here, 8 there" in str(refused.value)
    assert "aux_loss_coef" not in str(refused.value)


def test_other_data_is_refused(run: Run, config: RunConfig) -> None:
    path = run.checkpoint_dir / "step_000001"
    with pytest.raises(InputError, match="seed 1234, this run has 7"):
        store.load(start(replace(config, seed=7)), path)


def test_the_other_optimizer_is_refused(run: Run, config: RunConfig) -> None:
    path = run.checkpoint_dir / "step_000001"
    plain = replace(config, optim=replace(config.optim, distributed=False))
    with pytest.raises(InputError, match="optim.distributed=true"):
        store.load(start(plain), path)


def test_the_plain_optimizer_goes_on(config: RunConfig, tmp_path: Path) -> None:
    plain = replace(
        config, optim=replace(config.optim, distributed=False), run_dir=str(tmp_path / "plain")
    )
    run = start(plain)
    train_step(run)
    path = store.save(run)
    expected = [train_step(run).loss for _ in range(3)]
    resumed = start(plain)
    store.load(resumed, path)
    assert [train_step(resumed).loss for _ in range(3)] == expected


def test_hyperparameters_are_the_configurations(run: Run, config: RunConfig) -> None:
    path = run.checkpoint_dir / "step_000001"
    optim = replace(config.optim, betas=[0.8, 0.99], eps=1e-5, weight_decay=0.5)
    resumed = start(replace(config, optim=optim))
    store.load(resumed, path)
    for group in resumed.optimizer.param_groups:
        assert (tuple(group["betas"]), group["eps"]) == ((0.8, 0.99), 1e-5)
        assert group["weight_decay"] == 0.5 * group["wd_mult"]


def test_a_step_draws_nothing(run: Run) -> None:
    """So a checkpoint needs no random state."""

    def states() -> list[object]:
        own = tensor_parallel.get_cuda_rng_tracker().get_states().values()
        tensors = [state.tolist() for state in (torch.get_rng_state(), *own)]
        return [random.getstate(), repr(np.random.get_state()), *tensors]

    before = states()
    train_step(run)
    assert states() == before


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_checkpoint_is_one_sentence(run: Run, damage: str) -> None:
    path = run.checkpoint_dir / "step_000001"
    (tensors,) = path.glob("*.distcp")
    if damage == "missing":
        tensors.unlink()
    else:
        tensors.write_bytes(tensors.read_bytes()[:1000])
    with pytest.raises(InputError) as refused:
        store.load(start(run.config), path)
    assert str(refused.value).startswith(f"{path} cannot be read, a file")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_a_configuration_that_is_none_is_refused(run: Run) -> None:
    path = run.checkpoint_dir / "step_000001"
    (path / "config.json").write_text(json.dumps({"model": {"layers": 3}}))
    with pytest.raises(InputError, match="does not describe a model: unknown key model.layers"):
        saved_model(path)
    (path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as a configuration"):
        saved_model(path)
