"""Makes the faults that ``fault`` asks for."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_m1.training.callbacks.callback import Callback
from megatron_m1.training.faults.making import CONDITIONS, MAKERS
from megatron_m1.training.faults.plan import Fault, parse
from megatron_m1.training.run import Run

FOLDER = "faults"


class Injector(Callback[Run]):
    """Makes each fault once in the life of a run, however often that is restarted: before it acts
    it leaves RUN_DIR/faults/KIND@STEP:RANK with the time, in seconds since the epoch."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = [parse(text) for text in faults]
        if dist.get_rank() == 0:
            print(
                f"warning: fault injection is on, this run is a drill: {', '.join(faults)}",
                file=sys.stderr,
                flush=True,
            )

    def before_step(self, run: Run) -> None:
        for fault in self.faults:
            if self._is_due(fault, run):
                self._make(fault, run)

    def _is_due(self, fault: Fault, run: Run) -> bool:
        if fault.rank != dist.get_rank() or fault.step > run.progress.step + 1:
            return False
        is_possible = CONDITIONS.get(fault.kind, lambda run: True)
        return not _record(fault, run).exists() and is_possible(run)

    def _make(self, fault: Fault, run: Run) -> None:
        record = _record(fault, run)
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(str(time.time()))
        step = run.progress.step + 1
        print(f"fault: {fault}, at step {step}", file=sys.stderr, flush=True)
        MAKERS[fault.kind](run)


def _record(fault: Fault, run: Run) -> Path:
    return run.dir / FOLDER / str(fault)
