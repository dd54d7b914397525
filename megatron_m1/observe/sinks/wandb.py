"""Weights & Biases, with a run of the same id each time that a run folder is resumed."""

from __future__ import annotations

import html
import netrc
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from megatron_m1.observe.sinks.sink import Metrics, scalars

if TYPE_CHECKING:
    from megatron_m1.config import LoggerConfig

STEP = "train/step"


class Wandb:
    """Logs scalars and text; lists are skipped. Sending happens in wandb's own process.

    Charts run over `train/step` and not over wandb's own step, which cannot go back: a run that
    resumes from an earlier checkpoint would lose its points.
    """

    def __init__(self, config: LoggerConfig, run_dir: Path, run_config: dict[str, Any]) -> None:
        mode = choose_mode(config.wandb)
        os.environ.setdefault("WANDB_SILENT", "true")
        if mode == "offline":  # wandb would still send its own crash reports
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._html = wandb.Html
        self._run = wandb.init(
            project=config.wandb_project,
            entity=config.wandb_entity,
            name=config.wandb_name,
            id=_run_id(run_dir),
            resume="allow",
            dir=str(run_dir),
            mode=cast(Any, mode),
            config=run_config,
            allow_val_change=True,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("*", step_metric=STEP)

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log({**scalars(metrics), STEP: step})

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: self._html(f"<pre>{html.escape(text)}</pre>"), STEP: step})

    def close(self) -> None:
        self._run.finish()


def choose_mode(asked: str) -> str | None:
    """The mode to start wandb in. None leaves it to wandb, which reads WANDB_MODE."""
    if asked != "auto":
        return asked
    if "WANDB_MODE" in os.environ:
        return None
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(run_dir: Path) -> str:
    path = run_dir / "wandb_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:8])
    return path.read_text().strip()
