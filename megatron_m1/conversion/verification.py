"""Two sets of weights compared, as a ladder: names, shapes, dtypes, values, logits.

Both sides are read again from the disk. A rung that fails stops the climb: what is above it would
say nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from megatron_m1.checkpoint.models import model_differences
from megatron_m1.conversion.progress import Bar
from megatron_m1.conversion.recognition import Recognised
from megatron_m1.conversion.weights import Weights, shown
from megatron_m1.conversion.workers import Advance, work

OK, DIFFER, FAILED, SKIPPED = "ok", "differ", "FAILED", "skipped"


@dataclass(frozen=True)
class Rung:
    """One step of the ladder.

    Attributes:
        outcome: ok; differ (which is not wrong by itself); FAILED; skipped.
    """

    name: str
    outcome: str
    text: str

    def __str__(self) -> str:
        return f"{self.name:<8}{self.outcome:<9}{self.text}"


@dataclass(frozen=True)
class Sides:
    """The same model's weights in two places."""

    left: Weights
    right: Weights


def climb(
    sides: Sides, given: Recognised, workers: int, logits: Callable[[], Rung]
) -> Iterator[Rung]:
    """The rungs from the lowest, up to the first that fails.

    Args:
        given: the folder whose weights are on the right.
        logits: compares those of both sides; called if the values are the same.
    """
    for make in (
        lambda: _names(sides, set(given.decays)),
        lambda: _shapes(sides),
        lambda: _dtypes(sides),
        lambda: _values(sides, workers, given.decay_problems()),
        logits,
    ):
        rung = make()
        yield rung
        if rung.outcome == FAILED:
            return


def _names(sides: Sides, known: set[str]) -> Rung:
    problems = sides.left.name_problems() + sides.right.name_problems(known)
    if problems:
        return Rung("names", FAILED, "; ".join(problems))
    left, right = len(sides.left.expected()), len(sides.right.expected())
    parameters = len(sides.left.parameters)
    return Rung("names", OK, f"{parameters} parameters in {left} tensors here, {right} there")


def _shapes(sides: Sides) -> Rung:
    problems = sides.left.form_problems() + sides.right.form_problems()
    problems += model_differences(sides.left.model, sides.right.model).values()
    if problems:
        return Rung("shapes", FAILED, "; ".join(problems))
    return Rung("shapes", OK, f"{sides.left.model.num_params():,} numbers")


def differing_dtypes(sides: Sides) -> list[str]:
    """The parameters that are stored in other types, with both."""
    return [
        f"{name} ({_short(sides.left.dtype(name))} here, {_short(sides.right.dtype(name))} there)"
        for name in sides.left.parameters
        if sides.left.dtype(name) != sides.right.dtype(name)
    ]


def narrower_dtypes(sides: Sides) -> dict[str, torch.dtype]:
    """The narrower type of each parameter that is stored in two."""
    pairs = {
        name: (sides.left.dtype(name), sides.right.dtype(name)) for name in sides.left.parameters
    }
    return {name: narrower(*pair) for name, pair in pairs.items() if pair[0] != pair[1]}


def narrower(left: torch.dtype, right: torch.dtype) -> torch.dtype:
    """The type with fewer digits."""
    return max(left, right, key=lambda dtype: torch.finfo(dtype).eps)


def _dtypes(sides: Sides) -> Rung:
    found = differing_dtypes(sides)
    if not found:
        return Rung("dtypes", OK, "the same")
    return Rung("dtypes", DIFFER, f"{len(found)} of {len(sides.left.parameters)}: {shown(found)}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _values(sides: Sides, workers: int, problems: list[str]) -> Rung:
    if problems:
        return Rung("values", FAILED, shown(problems))
    names = list(sides.left.parameters)
    sizes = [sides.left.dtype(name).itemsize for name in names]
    total = sum(
        size * torch.Size(sides.left.parameters[name].shape).numel()
        for name, size in zip(names, sizes, strict=True)
    )
    with Bar("comparing", total) as bar:
        found = [text for text in work(_difference, sides, names, workers, bar.advance) if text]
    if found:
        return Rung("values", FAILED, f"{len(found)} parameters differ: {shown(sorted(found))}")
    rounded = " where rounded alike" if differing_dtypes(sides) else " bit for bit"
    return Rung("values", OK, f"{len(names)} parameters equal{rounded}")


def _difference(sides: Sides, name: str, advance: Advance) -> str | None:
    """What tells a parameter's two sides apart; None where nothing does."""
    left, right = sides.left.read(name), sides.right.read(name)
    advance(left.nbytes)
    narrow = narrower(left.dtype, right.dtype)
    left, right = left.to(narrow), right.to(narrow)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.dtype.itemsize]
    if torch.equal(left.contiguous().view(bits), right.contiguous().view(bits)):
        return None
    largest = (left.double() - right.double()).abs().max().item()
    return f"{name} (by up to {largest:.3g})"
