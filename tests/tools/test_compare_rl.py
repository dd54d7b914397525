"""tools/compare_rl.py: what its numbers are, and the whole as it is called from a shell."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_m1.dry_run import as_yaml
from megatron_m1.errors import EXIT_INPUT, EXIT_USAGE
from tools.compare_rl import Curves, _plain, read_curves, summary
from tools.compare_rl_runs import planned, teacher

ROOT = Path(__file__).resolve().parents[2]
KEYS = (
    *("model.num_layers=2", "model.layer_pattern=LS", "model.hidden_size=32"),
    *("model.ffn_hidden_size=32", "data.tasks=[{name: brackets, knobs: {length: 3, kinds: 1}}]"),
    *("teach.steps=40", "teach.lr=1e-2", "teach.examples=200", "teach.batch=4"),
    *("teach.seq_length=128", "rl.prompts_per_batch=4", "rl.group_size=4", "rl.refills=1"),
    *("rl.updates_per_batch=2", "rollout.max_new_tokens=6", "train.steps=2"),
)


def compare(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/compare_rl.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def curves(*rewards: list[float]) -> Curves:
    held = np.array(rewards)
    return Curves(16 * np.arange(held.shape[1]), held, held, {})


def test_share_is_of_the_updates_that_the_reference_made() -> None:
    reference = curves([0.0, 0.2, 0.3, 0.4, 0.5], [0.0, 0.2, 0.3, 0.4, 0.7])
    fast = curves([0.0, 0.5, 0.7, 0.8, 0.9], [0.0, 0.5, 0.7, 0.8, 0.9])
    found = summary(fast, reference)
    assert found["updates"] == 32
    assert found["share"] == 0.5
    # Of the reference's seeds only: its level is 0.5, 0.6 or 0.7.
    assert found["share_interval"] == (0.25, 0.5)
    assert found["final_reward"] == pytest.approx([0.9, 0])
    assert found["difference"][0] == pytest.approx(0.3)


def test_reference_against_itself_is_drawn_once() -> None:
    reference = curves([0.0, 0.1, 0.5], [0.0, 0.3, 0.9])
    found = summary(reference, reference)
    # With two draws the level of one seed would often be out of the other's reach.
    assert (found["share"], found["share_interval"]) == (1, (1, 1))
    assert found["difference"] == [0, 0]


def test_a_slow_objective_never_gets_there() -> None:
    found = summary(curves([0.0, 0.1], [0.0, 0.2]), curves([0.0, 0.5], [0.0, 0.6]))
    assert (found["updates"], found["share"]) == (math.inf, math.inf)
    assert found["share_interval"] == (math.inf, math.inf)
    assert _plain(found)["share_interval"] == [None, None]


def write_metrics(folder: Path, updates: list[int], rewards: list[float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": step, "train/step": step, "train/updates": made, "critic/rewards/mean": reward}
        | dict.fromkeys(("actor/pg_clipfrac", "actor/ppo_kl_k3", "cispo/ratio_max"), 0.5)
        | dict.fromkeys(("actor/entropy", "rollout/tokens"), 2)
        for step, (made, reward) in enumerate(zip(updates, rewards, strict=True), 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_reward_belongs_to_the_updates_before_its_batch(tmp_path: Path) -> None:
    run = teacher(tmp_path, [])
    write_metrics(run.folder, [16, 32, 48], [0.1, 0.2, 0.6])
    found = read_curves([run, run], window=2)
    assert found.updates.tolist() == [0, 16, 32]
    assert found.rewards.tolist() == [[0.1, 0.2, 0.6]] * 2
    assert found.smoothed[0] == pytest.approx([0.1, 0.15, 0.4])
    assert found.off_policy["clip_fraction"] == 0.5


def test_batches_with_fewer_updates_are_put_between(tmp_path: Path) -> None:
    full, short = teacher(tmp_path / "a", []), teacher(tmp_path / "b", [])
    for run, updates in ((full, [16, 32, 48, 64]), (short, [8, 24, 40, 56])):
        write_metrics(run.folder, updates, [0.0, 0.2, 0.4, 0.6])
    found = read_curves([full, short], window=1)
    assert found.updates.tolist() == [0, 16, 32]
    assert found.rewards == pytest.approx(np.array([[0.0, 0.2, 0.4], [0.0, 0.3, 0.5]]))


@pytest.mark.parametrize(
    ("steps", "is_finished"), [(None, False), (0, False), (1, False), (2, True)]
)
def test_a_run_is_finished_with_its_last_step(
    tmp_path: Path, steps: int | None, is_finished: bool
) -> None:
    (run,) = planned(tmp_path, ["dapo"], [1], tmp_path / "taught", KEYS)["dapo"]
    assert not run.is_finished()
    run.folder.mkdir()
    (run.folder / "config.yaml").write_text(as_yaml(run.config))
    if steps is not None:
        write_metrics(run.folder, [2, 4][:steps], [0.1, 0.2][:steps])
    assert run.is_finished() == is_finished


def test_it_teaches_runs_and_compares(tmp_path: Path) -> None:
    asked = ["--out", tmp_path, "--objectives", "dapo", "cispo", "--seeds", 1, 2, "--jobs", 2]
    asked += ["--set", *KEYS]
    done = compare(*asked)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "compare.json").read_text())
    assert report["updates"] == {"dapo": [0, 2], "cispo": [0, 2]}
    # The same model and the same first prompts, whatever the objective.
    first = {name: [seed[0] for seed in of] for name, of in report["rewards"].items()}
    assert first["dapo"] == first["cispo"]
    assert first["dapo"][0] != first["dapo"][1]
    assert report["summaries"]["dapo"]["share"] <= 1
    assert (tmp_path / "compare.png").stat().st_size > 10_000

    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.jsonl")}
    assert len(written) == 5
    again = compare(*asked)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished before") == 5
    assert {path: path.stat().st_mtime_ns for path in written} == written

    turned = compare("--reference", "cispo", *asked)
    assert "minus cispo's" in turned.stdout

    other = compare(*asked, "optim.lr=1e-5")
    assert other.returncode == EXIT_INPUT
    assert "teacher holds a run of another configuration" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--objectives", "cispo"], 2, "--objectives cispo lacks the --reference"),
        (["--seeds", "3", "3"], 2, "--seeds 3 3 names one twice"),
        (["--window", "0"], 2, "0 is no number from 1 on"),
        (["--set", "optim.lrate=1"], EXIT_USAGE, "optim.lrate"),
        (["--taught", "nowhere"], EXIT_INPUT, "--taught nowhere is no folder"),
        (
            ["--taught", "tests", "--seeds", "1", "--set", "train.steps=1"],
            EXIT_USAGE,
            "give 2 or more",
        ),
        (
            ["--taught", "tests", "--seeds", "1", "--set", "rl.group_size=0"],
            EXIT_INPUT,
            "grpo-1 ended with 64: ",
        ),
    ],
)
def test_what_cannot_be_run_is_one_sentence(
    tmp_path: Path, arguments: list[str], code: int, sentence: str
) -> None:
    done = compare("--out", tmp_path, *arguments)
    assert done.returncode == code
    assert sentence in done.stderr and "Traceback" not in done.stderr
