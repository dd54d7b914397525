"""TensorBoard event files in RUN_DIR/tensorboard."""

from __future__ import annotations

import textwrap
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from megatron_m1.observe.sinks.sink import Metrics, scalars


class TensorBoard:
    """Logs scalars and text; lists are skipped. Points of steps that are run again are replaced."""

    def __init__(self, run_dir: Path, resumed_step: int | None) -> None:
        first_step = 0 if resumed_step is None else resumed_step + 1
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in scalars(metrics).items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        # Indented, for TensorBoard reads text as Markdown.
        self._writer.add_text(name, textwrap.indent(text, "    "), step)

    def close(self) -> None:
        self._writer.close()
