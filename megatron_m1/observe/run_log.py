"""What a run folder says about a run: the metrics as curves, and the numbers that sum them up."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_m1.errors import InputError
from megatron_m1.observe.records import METRICS_FILE, read_records

REWARD = "critic/rewards/mean"
LAST_REWARDS = 10  # records that a run's first and last reward are averaged over
LAST_LOADS = 20  # records that the expert load is averaged over


@dataclass(frozen=True)
class Curve:
    """One metric over the steps of a run; a value may be NaN or infinite."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def finite(self) -> Curve:
        keep = np.isfinite(self.values)
        return Curve(self.steps[keep], self.values[keep])

    def smoothed(self, window: int) -> Curve:
        """The mean of the middle half of `window` values around each of at most 1000 steps.

        One spike so leaves no trace. Near the first step the window is narrower: loss falls so
        fast there that a window on one side would shift the curve.
        """
        curve, half = self.finite, window // 2
        size = len(curve.values)
        centers = np.unique(np.linspace(0, size - 1, min(size, 1000)).astype(int))
        windows = (curve.values[max(0, i - half) : i + min(half, i) + 1] for i in centers)
        return Curve(curve.steps[centers], np.array([_middle_mean(values) for values in windows]))


@dataclass(frozen=True)
class RunLog:
    """One run as its folder tells it.

    Attributes:
        load: [layers, experts] share of the tokens over the last records; None for no record.
        layer_kinds: L (lightning) or S (softmax) for each layer of `load`; empty if unknown.
        texts: the newest text of each name, with its step.
    """

    name: str
    model: str
    curves: dict[str, Curve]
    load: np.ndarray | None
    layer_kinds: str
    texts: dict[str, tuple[int, str]]

    @property
    def is_rl(self) -> bool:
        return REWARD in self.curves

    def curve(self, metric: str) -> Curve:
        """A metric over the steps; empty where the run did not record it."""
        return self.curves.get(metric, Curve(np.array([]), np.array([])))

    def summary(self) -> dict[str, float | None]:
        """The key numbers of the run; None where it did not record what they rest on.

        `wall_time_s` is the time spent in optimizer steps, `mfu` a share of 1, and
        `max_load_violation` how far the busiest expert was above its fair share (0 is balanced).
        """
        loss, val = self.curve("train/loss").finite, self.curve("val/loss").finite
        best = int(np.argmin(val.values)) if len(val.values) else None
        return {
            "steps": _last(self.curve("train/step").steps),
            "first_reward": _mean(self.curve(REWARD).finite.values[:LAST_REWARDS]),
            "last_reward": _mean(self.curve(REWARD).finite.values[-LAST_REWARDS:]),
            "first_loss": float(loss.values[0]) if len(loss.values) else None,
            "last_loss": _last(loss.values),
            "best_val_loss": None if best is None else float(val.values[best]),
            "best_val_step": None if best is None else int(val.steps[best]),
            "tokens": _whole(_last(self.curve("train/tokens").finite.values)),
            "tokens_per_s_median": _reduce(np.median, self.curve("perf/tokens_per_s")),
            "wall_time_s": _time_in_steps(
                self.curve("timing_s/step" if self.is_rl else "time/step")
            ),
            "last_length": _last(self.curve("response_length/mean").finite.values),
            "last_entropy": _last(self.curve("actor/entropy").finite.values),
            "clip_fraction_median": _reduce(np.median, self.curve("actor/pg_clipfrac")),
            "probs_diff_max": _reduce(np.max, self.curve("training/rollout_probs_diff_max")),
            "pearson_min": _reduce(np.min, self.curve("training/rollout_actor_probs_pearson_corr")),
            "mfu_median": _reduce(np.median, self.curve("perf/mfu")),
            "peak_mem_gib": _reduce(np.max, self.curve("perf/peak_mem_gib")),
            "max_load_violation": _reduce(np.max, self.curve("moe/max_violation")),
        }


def read_run(run_dir: Path) -> RunLog:
    """Read a run folder: metrics.jsonl, and config.yaml where there is one.

    Raises:
        InputError: metrics.jsonl is missing, cannot be read, or holds no record.
    """
    path = run_dir / METRICS_FILE
    points: dict[str, dict[int, float]] = defaultdict(dict)
    loads: deque[Any] = deque(maxlen=LAST_LOADS)
    texts: dict[str, tuple[int, str]] = {}
    try:
        for record in read_records(path):
            step = record.pop("step")
            texts.update({name: (step, text) for name, text in record.pop("text", {}).items()})
            if "moe/load" in record:
                loads.append(record["moe/load"])
            for name, value in record.items():
                if isinstance(value, int | float):
                    points[name][step] = value
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if not points:
        raise InputError(f"{path} holds no record of a step")
    model = _model_config(run_dir)
    load = np.mean(np.array(loads, dtype=float), axis=0) if loads else None
    return RunLog(
        name=run_dir.resolve().name,
        model=str(model.get("name", "")),
        curves={name: _curve(values) for name, values in points.items()},
        load=load,
        layer_kinds=_layer_kinds(model, 0 if load is None else len(load)),
        texts=texts,
    )


def _curve(points: dict[int, float]) -> Curve:
    steps = sorted(points)
    return Curve(np.array(steps), np.array([points[step] for step in steps], dtype=float))


def _model_config(run_dir: Path) -> dict[str, Any]:
    """The model section of config.yaml. The report needs none: what cannot be read is left out."""
    try:
        return dict(yaml.safe_load((run_dir / "config.yaml").read_text())["model"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return {}


def _layer_kinds(model: dict[str, Any], layers: int) -> str:
    pattern = str(model.get("layer_pattern", ""))
    return "" if set(pattern) - set("LS") else (pattern * layers)[:layers]


def _middle_mean(values: np.ndarray) -> float:
    cut = len(values) // 4
    return float(np.sort(values)[cut : len(values) - cut].mean())


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _last(values: np.ndarray) -> float | None:
    return values[-1].item() if len(values) else None


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _reduce(reduce: Callable[[np.ndarray], float], curve: Curve) -> float | None:
    values = curve.finite.values
    return float(reduce(values)) if len(values) else None


def _time_in_steps(curve: Curve) -> float | None:
    """Seconds in all steps, where a record stands for the steps since the record before it."""
    if not len(curve.values):
        return None
    gaps = np.diff(curve.steps, prepend=curve.steps[0] - 1)
    return float(np.nansum(gaps * curve.values))
