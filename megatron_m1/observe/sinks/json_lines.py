"""RUN_DIR/metrics.jsonl: the record that every run keeps, whatever else it logs to."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_m1.observe.records import METRICS_FILE, encode, read_records
from megatron_m1.observe.sinks.sink import Metrics


class JsonLines:
    """Appends one JSON object per call, flushed at once so that a killed run keeps its lines.

    A run that goes on from a checkpoint drops the records after it. A run that starts anew in a
    used folder moves the old records to metrics.jsonl.old.
    """

    def __init__(self, run_dir: Path, resumed_step: int | None) -> None:
        path = run_dir / METRICS_FILE
        if path.exists():
            if resumed_step is None:
                path.replace(path.with_name(METRICS_FILE + ".old"))
            else:
                _drop_after(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Metrics) -> None:
        self._write(encode(step, metrics))

    def text(self, step: int, name: str, text: str) -> None:
        self._write(encode(step, {"text": {name: text}}))

    def close(self) -> None:
        self._file.close()

    def _write(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()


def _drop_after(path: Path, step: int) -> None:
    """Rewrite a file without the records after `step`; it is whole at every moment."""
    shorter = path.with_name(path.name + ".new")
    with shorter.open("w", encoding="utf-8") as file:
        for record in read_records(path):
            if record["step"] <= step:
                file.write(encode(record.pop("step"), record) + "\n")
        file.flush()
        os.fsync(file.fileno())
    shorter.replace(path)
