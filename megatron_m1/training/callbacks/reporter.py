"""Draws the picture of the run."""

from __future__ import annotations

import torch.distributed as dist

from megatron_m1.observe.report import write_report
from megatron_m1.training.callbacks.callback import Callback
from megatron_m1.training.state import Training


class Reporter(Callback[Training]):
    """Writes RUN_DIR/report.png and its page when training ends."""

    def on_end(self, run: Training) -> None:
        if dist.get_rank() == 0:
            report = write_report([run.dir], run.dir)
            run.sinks.text(run.progress.step, "report", str(report.png))
