"""The comparison in words and numbers."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from megatron_m1.attribution.errors import Attribution, ModuleError

_METRICS = {
    "training/rollout_actor_probs_pearson_corr": "Pearson correlation",
    "training/rollout_probs_diff_mean": "mean difference",
    "training/rollout_probs_diff_max": "largest difference",
    "rollout_corr/k3_kl": "KL divergence (k3), nats",
}


def describe(found: Attribution) -> str:
    """Tables by layer and by kind, the probabilities, and where the two part."""
    return "\n".join(
        [*_by_layer(found), "", *_by_kind(found), "", *_probabilities(found), "", *_verdict(found)]
    )


def as_json(found: Attribution) -> dict[str, Any]:
    """Every number; what is not finite as null."""
    first = found.first
    return {
        "first": first.kind if first else None,
        "largest": found.largest.kind,
        "decisive": found.decisive,
        "modules": [_finite(asdict(module)) for module in found.modules],
        "without": _finite(found.without),
        "metrics": _finite(found.metrics),
    }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def _by_layer(found: Attribution) -> list[str]:
    lines = [f"{'layer':>5}  {'module':15}{'enters':>10}{'leaves':>10}{'adds':>10}  experts"]
    for module in found.modules:
        layer = "" if module.layer is None else str(module.layer)
        errors = "".join(f"{x:10.1e}" for x in (module.enters, module.leaves, module.adds))
        lines.append(f"{layer:>5}  {module.kind:15}{errors}  {_flips(module)}".rstrip())
    return lines


def _flips(module: ModuleError) -> str:
    if module.flips is None:
        return ""
    return f"{module.flips:.2%} of the tokens to others, {module.adds_flips:.2%} added"


def _by_kind(found: Attribution) -> list[str]:
    lines = [f"{'kind':15}{'adds most':>11}  {'in layer':>8}  {'mean difference without':>24}"]
    for kind, module in found.most.items():
        layer = "" if module.layer is None else str(module.layer)
        left = found.without.get(kind)
        lines.append(
            f"{kind:15}{module.adds:11.1e}  {layer:>8}  {'' if left is None else f'{left:24.2e}'}"
        )
    return [line.rstrip() for line in lines]


def _probabilities(found: Attribution) -> list[str]:
    lines = ["probabilities of the tokens drawn, rollout against trainer:"]
    for metric, title in _METRICS.items():
        if metric in found.metrics:
            lines.append(f"  {title:26}{found.metrics[metric]:.7g}")
    return lines


def _verdict(found: Attribution) -> list[str]:
    if found.first is None:
        lines = ["No module adds more than the order of sums explains."]
    else:
        lines = [f"They part first in {_named(found.first)}."]
    lines.append(f"Most, for its precision, is added by {_named(found.largest)}.")
    before, left = found.metrics["training/rollout_probs_diff_mean"], found.without[found.decisive]
    if left < before:
        lines.append(
            f"Without what {found.decisive} adds, the mean difference of the probabilities falls "
            f"from {before:.1e} to {left:.1e}."
        )
    return lines


def _named(module: ModuleError) -> str:
    where = "" if module.layer is None else f" of layer {module.layer}"
    return f"{module.kind}{where} ({module.adds:.1e})"
