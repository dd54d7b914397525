"""The numbers of a step as a reader sees them, shared by both consoles."""

from __future__ import annotations

import datetime
import time
from collections import deque

from megatron_m1.observe.sinks.sink import Metrics, scalars

# metric -> how it is shown, in the order shown. A metric that a record lacks is left out.
FIELDS = {
    "critic/rewards/mean": "reward {:.3f}",
    "response_length/mean": "length {:.1f}",
    "actor/entropy": "entropy {:.3f}",
    "actor/pg_clipfrac": "clipped {:.1%}",
    "actor/grad_norm": "grad norm {:.3f}",
    "training/rollout_actor_probs_pearson_corr": "corr {:.5f}",
    "train/loss": "loss {:.4f}",
    "optim/grad_norm": "grad norm {:.3f}",
    "optim/lr": "lr {:.2e}",
    "perf/tokens_per_s": "{:,.0f} tokens/s",
    "perf/throughput": "{:,.0f} tokens/s",
    "perf/mfu": "MFU {:.1%}",
    "perf/peak_mem_gib": "mem {:.1f} GiB",
    "time/step": "time {:.2f} s",
    "timing_s/step": "time {:.2f} s",
    "val/loss": "val loss {:.4f}",
    "val/ppl": "val ppl {:.2f}",
}


def format_fields(metrics: Metrics, names: tuple[str, ...] = tuple(FIELDS)) -> list[str]:
    """The known metrics of a record, in their fixed order."""
    numbers = scalars(metrics)
    return [FIELDS[name].format(numbers[name]) for name in names if name in numbers]


def format_line(step: int, total_steps: int, metrics: Metrics) -> str:
    """One record as one line, with the step padded so that lines stay aligned."""
    counter = f"step {step:>{len(str(total_steps))}}/{total_steps}"
    return " | ".join([counter, *format_fields(metrics)])


def printable(text: str) -> str:
    """Text that cannot steer the terminal: a model may write escape sequences."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


class Pace:
    """The time left, from the wall time of the last steps with all that happened between them."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._marks: deque[tuple[int, float]] = deque(maxlen=50)

    def mark(self, step: int) -> None:
        self._marks.append((step, time.monotonic()))

    def eta(self) -> str:
        """Hours, minutes and seconds as "1:02:03", or "?" before two steps are marked."""
        if not self._marks or self._marks[0][0] == self._marks[-1][0]:
            return "?"
        (first, start), (last, end) = self._marks[0], self._marks[-1]
        seconds = (end - start) / (last - first) * max(0, self._total - last)
        return str(datetime.timedelta(seconds=round(seconds)))
