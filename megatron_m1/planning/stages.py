"""What each pipeline rank holds, and a cut of the layers that makes room for the head."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from megatron_m1.model.config import ModelConfig
from megatron_m1.pipeline_stages import stages
from parallel.layout import Layout


@dataclass(frozen=True)
class Stage:
    """The layers of one pipeline rank, over all its virtual stages.

    Attributes:
        rank: of the pipeline, from 0.
        kinds: a letter for each of its layers.
    """

    rank: int
    kinds: str
    has_embedding: bool
    has_head: bool


def pipeline_ranks(model: ModelConfig, layout: Layout) -> list[Stage]:
    """One ``Stage`` a pipeline rank."""
    kinds = iter(model.layer_kinds)
    # In Megatron's order of layers; t is a layer of the next kind.
    parts = [
        "".join(next(kinds) if letter == "t" else letter.lower() for letter in part)
        for part in stages(layout, model.num_layers)
    ]
    held = ["".join(parts[rank :: layout.pp]) for rank in range(layout.pp)]
    return [
        Stage(rank, letters.strip("el"), "e" in letters, "l" in letters)
        for rank, letters in enumerate(held)
    ]


def cut_with_head(num_layers: int, pp: int, vpp: int, head: float) -> str | None:
    """A layout string whose last stage has fewer layers, since it has the head as well.

    Args:
        vpp: virtual stages on each rank, 1 for none.
        head: the time of the head in layers.

    Returns:
        For example ``Et*11|(t*11|)*6t*3L``; None where an even cut is no worse.
    """
    parts, least = pp * vpp, 0 if vpp > 1 else 1
    if pp == 1 or num_layers <= parts:
        return None
    # A rank's time is that of its vpp stages together, so the last one makes up for all of them.
    last = max(round((num_layers + head) / pp - head - (vpp - 1) * num_layers / parts), least)
    each, longer = divmod(num_layers - last, parts - 1)
    counts = [each] * (parts - 1 - longer) + [each + 1] * longer
    if last >= counts[0] and not longer:
        return None
    middle = (f"(t*{count}|)*{len(list(run))}" for count, run in groupby(counts[1:]))
    return f"Et*{counts[0]}|{''.join(middle)}{f't*{last}' if last else ''}L"
