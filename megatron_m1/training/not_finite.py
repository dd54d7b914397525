"""Steps whose loss or gradient is not finite: they are skipped, and when that does not end, the run
ends, with what made them in RUN_DIR/not_finite."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_m1.errors import NotFinite
from megatron_m1.files import whole
from megatron_m1.model.build import unwrap

if TYPE_CHECKING:
    from megatron_m1.training.callbacks.callback import Callback
    from megatron_m1.training.run import Run
    from megatron_m1.training.step import StepResult

FOLDER = "not_finite"


def stop_or_skip(run: Run, result: StepResult, callbacks: Sequence[Callback[Run]]) -> None:
    """Say that a step was skipped, or that it was one too many. Every process calls it.

    Raises:
        NotFinite: ``train.max_skipped`` steps before it were skipped too.
    """
    progress, most = run.progress, run.config.train.max_skipped
    what = f"step {progress.step}: loss {result.loss}, gradient norm {result.grad_norm}"
    _say_where(progress.step, result)
    if progress.skipped_in_a_row <= most:
        run.sinks.text(progress.step, "skipped", what)
        if dist.get_rank() == 0:
            print(f"warning: {what}: the weights stay as they were", file=sys.stderr, flush=True)
        return
    for callback in callbacks:
        callback.on_stop(run)
    before = f", as in the {most} steps before" if most else ""
    raise NotFinite(
        f"{what}{before}: nothing is saved after it; lower optim.lr or look at {dump(run, result)}"
    )


def dump(run: Run, result: StepResult) -> Path:
    """Leave what this process computed in a step: tokens and loss of its micro-batches, and the
    norms of its parts of weights and gradients.

    Returns:
        The folder, which holds a file for each process.
    """
    folder = run.dir / FOLDER / f"step_{run.progress.step:06d}"
    found = {
        "rank": dist.get_rank(),
        "step": run.progress.step,
        "loss": _plain(result.loss),
        "grad_norm": _plain(result.grad_norm),
        "micro_batches": list(_micro_batches(result)),
        "parameters": dict(_norms(run)),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole(folder / f"rank_{dist.get_rank():05d}.json") as partial:
            partial.write_text(json.dumps(found))
    except OSError as error:
        print(f"warning: {folder} cannot be written: {error}", file=sys.stderr, flush=True)
    return folder


def _say_where(step: int, result: StepResult) -> None:
    """The process whose own loss it is names it; the mean of all no longer tells."""
    wrong = [index for index, sums in enumerate(result.sums) if not math.isfinite(_mean(sums))]
    if wrong:
        print(
            f"warning: step {step}: rank {dist.get_rank()}: micro-batches {wrong} of "
            f"{len(result.sums)} have a loss that is not finite",
            file=sys.stderr,
            flush=True,
        )


def _micro_batches(result: StepResult) -> Iterator[dict[str, Any]]:
    for index, row in enumerate(result.rows):
        loss = _plain(_mean(result.sums[index])) if result.sums else None
        tokens, bounds = row.tokens.flatten().tolist(), row.document_bounds.tolist()
        yield {"tokens": tokens, "document_bounds": bounds, "loss": loss}


def _mean(sums: Tensor) -> float:
    return float(sums[0] / sums[1].clamp(min=1))


@torch.no_grad()
def _norms(run: Run) -> Iterator[tuple[str, dict[str, float | str]]]:
    """With a sharded optimizer a gradient is the sum over processes only in this one's share."""
    for index, chunk in enumerate(run.chunks):
        for name, weight in unwrap(chunk).named_parameters():
            yield (
                f"model{index}.{name}",
                {
                    "weight": _plain(float(weight.norm())),
                    "gradient": _plain(float(weight.main_grad.norm())),
                },
            )


def _plain(value: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else str(value)
