"""A run that a server draws for against the one that draws for itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.distributed import Pool
from tests.rl.rollout.small_run import config, curve, own_server, responses, trained, write_start

LAYOUTS = {
    "one_process": (1, []),
    "tp2": (2, ["parallel.tp=2"]),
    "dp2": (2, []),
}
# Of differences between two ways of computing the same: rounding errors are all of them.
MISMATCH = (
    *(f"training/rollout_probs_diff_{name}" for name in ("mean", "max", "std")),
    *("rollout_corr/kl", "rollout_corr/k3_kl", "training/rollout_actor_probs_pearson_corr"),
)


@pytest.fixture(scope="module")
def native(ranks: Callable[[int], Pool], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    ranks(1).run(trained, config(folder, f"run_dir={folder}/run"))
    return folder / "run"


@pytest.fixture(scope="module")
def server(ranks: Callable[[int], Pool], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    ranks(1).run(write_start, config(folder), folder / "start")
    with own_server(folder / "start", folder / "log") as (process, url):
        yield url
    assert process.returncode == 0, (folder / "log").read_text()


def http(url: str) -> list[str]:
    return ["rollout=http", f"rollout.http.urls=[{url}]", "rollout.http.backoff=0.05"]


def assert_same(found: Path, expected: Path, rel: float) -> None:
    mine, others = responses(found), responses(expected)
    assert mine.keys() == others.keys() and len(mine) > 40
    for key, one in mine.items():
        for name in ("tokens", "versions", "finish"):
            assert one[name] == others[key][name], (key, name)
        for name in ("logprobs", "raw_logprobs"):
            assert one[name] == pytest.approx(others[key][name], abs=2e-5), (key, name)
    for one, other in zip(curve(found), curve(expected), strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            near = pytest.approx(value, rel=rel, abs=1e-5 if name in MISMATCH else 1e-6)
            assert one[name] == near, (one["train/step"], name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_served_and_native_runs_are_the_same(
    name: str, ranks: Callable[[int], Pool], native: Path, server: str, tmp_path: Path
) -> None:
    size, layout = LAYOUTS[name]
    given = config(tmp_path, *http(server), *layout, f"run_dir={tmp_path}/run")
    ranks(size).run(trained, given)
    assert_same(tmp_path / "run", native, 1e-5 if size == 1 else 2e-4)
    last = curve(tmp_path / "run")[-1]
    assert last["training/rollout_logprobs_missing"] == 0
    assert math.isfinite(last["rollout/perplexity"]) and last["actor/grad_norm"] > 0
    kept = sorted(path.name.split("-")[1] for path in (tmp_path / "run" / "weights").iterdir())
    assert kept == ["2", "3"]
    (model,) = httpx.get(f"{server}/v1/models").json()["data"]
    assert model["weight_version"] == 3 and model["id"].startswith("policy-3-")


def test_a_server_draws_while_the_model_is_trained(
    ranks: Callable[[int], Pool], server: str, tmp_path: Path
) -> None:
    ahead = ["rl.max_staleness=1", "rl.old_logprobs=rollout", "rollout.tokens_per_step=null"]
    given = config(tmp_path, *http(server), *ahead, f"run_dir={tmp_path}/run")
    ranks(2).run(trained, given)
    stale = [one["training/off_policy/trajectory_staleness/max"] for one in curve(tmp_path / "run")]
    assert stale == [0, 1, 1]
