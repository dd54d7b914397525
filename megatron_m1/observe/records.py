"""The lines of RUN_DIR/metrics.jsonl: how a record is written as a line and read back.

A line is `{"step": 7, "train/loss": 3.2, ...}` or `{"step": 7, "text": {name: text}}`. JSON has no
NaN and no infinity, so these are written as the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


def encode(step: int, values: dict[str, Any]) -> str:
    """One record as one line, without its line end."""
    return json.dumps({"step": step, **{name: _plain(value) for name, value in values.items()}})


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file in the order they were written, with NaN and infinity as floats.

    A line that is no record is skipped: a killed run or a full disk leaves half a line behind.
    """
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
                record["step"] = int(record["step"])
            except (ValueError, TypeError, KeyError):
                continue
            yield {name: _number(value) for name, value in record.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict | str | int):
        return value
    value = float(value)
    return value if math.isfinite(value) else str(value)


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value
