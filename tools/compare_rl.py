"""GRPO, DAPO and CISPO from the same taught model over several seeds: reward against updates.

    python tools/compare_rl.py [--out runs/compare_rl] [--taught RUN_DIR] [--jobs 1]
                               [--objectives grpo dapo cispo] [--reference dapo]
                               [--seeds 1 2 3 4 5] [--window 5] [--set KEY=VALUE ...]

Runs `experiment=compare_rl` for every objective and seed, with the keys given; what is finished is
not run again, and what was interrupted goes on. Reports how many updates each objective needs to
the reference's final reward, and writes compare.json and compare.png.

The reward of a batch is that of fresh problems, before the policy is trained on them.

S  seeds        B  rollout batches
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from megatron_m1.errors import InputError, UserError
from megatron_m1.observe.run_log import REWARD, RunLog, read_run
from tools.compare_rl_figure import draw
from tools.compare_rl_runs import OBJECTIVES, Run, planned, teacher
from tools.machine import processor
from tools.seeds import bootstrap_interval, first_reaching, half_interval, trailing_mean

PACKAGES = ("torch", "megatron-core", "numpy")
# What says how far a policy went from the one that drew its batch; means over a run.
OFF_POLICY = {
    "clip_fraction": "actor/pg_clipfrac",
    "kl": "actor/ppo_kl_k3",
    "ratio_max": "cispo/ratio_max",
    "entropy": "actor/entropy",
    "tokens_drawn": "rollout/tokens",
}


@dataclass(frozen=True)
class Curves:
    """The runs of one objective.

    Attributes:
        updates: [B] finished before a batch was drawn.
        rewards: [S, B] of that batch.
        smoothed: [S, B] the mean over the last batches.
        off_policy: means over runs and steps.
    """

    updates: np.ndarray
    rewards: np.ndarray
    smoothed: np.ndarray
    off_policy: dict[str, float]


def read_curves(runs: Sequence[Run], window: int) -> Curves:
    """The runs' rewards at the same updates: every batch's, where each run made all its updates."""
    logs = [read_run(run.folder) for run in runs]
    before = [np.concatenate([[0], log.curve("train/updates").values[:-1]]) for log in logs]
    per_batch = runs[0].config.rl.updates_per_batch
    updates = np.arange(0, min(positions[-1] for positions in before) + 1, per_batch)
    rewards = np.array(
        [
            np.interp(updates, positions, log.curve(REWARD).values)
            for positions, log in zip(before, logs, strict=True)
        ]
    )
    found = {name: _mean(logs, metric) for name, metric in OFF_POLICY.items()}
    return Curves(updates, rewards, trailing_mean(rewards, window), found)


def _mean(logs: Sequence[RunLog], metric: str) -> float:
    return float(np.mean([log.curve(metric).values.mean() for log in logs]))


def summary(curves: Curves, reference: Curves) -> dict[str, Any]:
    """An objective against the reference.

    ``updates`` are those after which its mean curve first reaches the reference's final reward, and
    ``share`` is theirs of all that the reference made. Intervals are of 95 %: of the final reward
    and of its difference from the reference's, seed by seed, Student's; of the share by drawing
    seeds again.
    """
    final, last = curves.smoothed[:, -1], reference.updates[-1]
    differences = final - reference.smoothed[:, -1]

    def share(own: np.ndarray, *others: np.ndarray) -> float:
        level = (others or (own,))[0][:, -1].mean()
        return first_reaching(curves.updates, own.mean(axis=0), level) / last

    samples = [curves.smoothed]
    if curves is not reference:
        samples.append(reference.smoothed)
    found = share(*samples)
    return {
        "final_reward": [float(final.mean()), float(half_interval(final))],
        "difference": [float(differences.mean()), float(half_interval(differences))],
        "updates": found * last,
        "share": found,
        "share_interval": bootstrap_interval(share, *samples),
        **curves.off_policy,
    }


def table(summaries: dict[str, dict[str, Any]], reference: str) -> str:
    """The summaries as lines of text."""
    of = f"{reference}'s"
    head = f"{'final reward':>18}{'minus ' + of:>20}{'updates to it':>15}{'share of ' + of:>22}"
    lines = [f"{'':8}{head}{'clipped':>10}{'KL':>9}"]
    for name, one in summaries.items():
        lines.append(
            f"{name:8}{_with_width(one['final_reward']):>18}{_with_width(one['difference']):>20}"
            f"{_or_never(one['updates'], '.0f'):>15}{_share(one):>22}"
            f"{one['clip_fraction']:10.4f}{one['kl']:9.4f}"
        )
    return "\n".join(lines)


def _share(one: dict[str, Any]) -> str:
    ends = [_or_never(end, ".2f") for end in one["share_interval"]]
    return f"{_or_never(one['share'], '.2f')} [{', '.join(ends)}]"


def _or_never(value: float, form: str) -> str:
    return "never" if value == math.inf else format(value, form)


def _with_width(value: Sequence[float]) -> str:
    return "{:.3f} +- {:.3f}".format(*value)


def write(
    out: Path,
    keys: Sequence[str],
    reference: str,
    curves: dict[str, Curves],
    found: dict[str, dict[str, Any]],
) -> None:
    """Everything that the table and the picture rest on, as compare.json."""
    report = {
        "reference": reference,
        "cpu": processor(),
        "versions": {name: version(name) for name in PACKAGES},
        "keys": list(keys),
        "updates": {name: one.updates.tolist() for name, one in curves.items()},
        "rewards": {name: one.rewards.tolist() for name, one in curves.items()},
        "summaries": found,
    }
    # JSON has no infinity: what is never reached is null.
    (out / "compare.json").write_text(json.dumps(_plain(report), indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compare(args: argparse.Namespace) -> None:
    """Teach, run, read, and tell."""
    out = args.out.resolve()
    taught = args.taught
    if taught is None:
        first = teacher(out, args.keys)
        first.complete()
        taught = first.folder / "taught"
    elif not taught.is_dir():
        raise InputError(
            f"--taught {taught} is no folder: give RUN_DIR/taught of a run that taught"
        )
    runs = planned(out, args.objectives, args.seeds, taught.resolve(), args.keys)
    if runs[args.reference][0].config.train.steps < 2:
        raise UserError("train.steps=1 ends before any update has shown: give 2 or more")
    # Seed by seed, so that what is there early compares the objectives.
    queue = [run for of_a_seed in zip(*runs.values(), strict=True) for run in of_a_seed]
    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in pool.map(Run.complete, queue):
            pass
    curves = {name: read_curves(of_one, args.window) for name, of_one in runs.items()}
    found = {name: summary(one, curves[args.reference]) for name, one in curves.items()}
    print(table(found, args.reference))
    write(out, args.keys, args.reference, curves, found)
    drawn = {name: (one.updates, one.smoothed) for name, one in curves.items()}
    draw(drawn, args.reference, out / "compare.png")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 on")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare objectives of RL over seeds.")
    parser.add_argument("--out", type=Path, default=Path("runs/compare_rl"), help="all runs")
    parser.add_argument("--taught", type=Path, help="a model to start from, taught before")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=[*OBJECTIVES])
    parser.add_argument("--reference", choices=OBJECTIVES, default="dapo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=_positive, default=1, help="runs at a time")
    parser.add_argument(
        "--window", type=_positive, default=5, help="batches that a curve is smoothed over"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], dest="keys", metavar="KEY=VALUE", help="of every run"
    )
    args = parser.parse_args()
    if args.reference not in args.objectives:
        parser.error(f"--objectives {' '.join(args.objectives)} lacks the --reference")
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds {' '.join(map(str, args.seeds))} names one twice")
    try:
        compare(args)
    except UserError as error:
        print(f"compare_rl: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
