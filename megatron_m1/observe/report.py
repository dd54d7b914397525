"""A report of one run, or of several over each other: a figure, a page and the key numbers."""

from __future__ import annotations

import base64
import datetime
import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_m1.files import whole
from megatron_m1.observe.figure import draw
from megatron_m1.observe.run_log import RunLog, read_run

# key number -> its title and how it is shown.
ROWS: dict[str, tuple[str, Callable[[float], str]]] = {
    "steps": ("steps", "{:,.0f}".format),
    "first_reward": ("first reward, mean of 10 records", "{:.4f}".format),
    "last_reward": ("last reward, mean of 10 records", "{:.4f}".format),
    "last_length": ("last mean length, tokens", "{:,.1f}".format),
    "last_entropy": ("last entropy, nats", "{:.3f}".format),
    "clip_fraction_median": ("clip fraction, median", "{:.2%}".format),
    "probs_diff_max": (
        "rollout against trainer, largest difference of probability",
        "{:.2e}".format,
    ),
    "pearson_min": ("rollout against trainer, lowest correlation", "{:.6f}".format),
    "first_loss": ("first loss", "{:.4f}".format),
    "last_loss": ("last loss", "{:.4f}".format),
    "best_val_loss": ("best validation loss", "{:.4f}".format),
    "best_val_step": ("at step", "{:,.0f}".format),
    "tokens": ("tokens", "{:,.0f}".format),
    "tokens_per_s_median": ("tokens per second, median", "{:,.0f}".format),
    "wall_time_s": ("time in steps", lambda s: str(datetime.timedelta(seconds=round(s)))),
    "mfu_median": ("MFU, median", "{:.1%}".format),
    "peak_mem_gib": ("peak memory, GiB", "{:.1f}".format),
    "max_load_violation": ("highest load violation", "{:.2f}".format),
}
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #2b2d33; max-width: 1100px;
       margin: 2.5rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.1rem; margin-top: 2.5rem; }}
img {{ width: 100%; }}
table {{ border-collapse: collapse; margin-top: 1.5rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem 1.25rem .35rem 0; border-bottom: 1px solid #eceef2; text-align: right; }}
th:first-child {{ text-align: left; font-weight: normal; color: #7d828c; }}
pre {{ background: #f6f7f9; padding: 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }}
</style>
<h1>{title}</h1>
<img alt="Curves of the run, and the load of its experts"
     src="data:image/png;base64,{png}">
<table>
{table}
</table>
{texts}
</html>
"""


@dataclass(frozen=True)
class Report:
    """The files of a report."""

    png: Path
    html: Path
    json: Path


def write_report(run_dirs: Sequence[Path], out_dir: Path) -> Report:
    """Write report.png, report.html and report.json from the metrics.jsonl of each run.

    Raises:
        InputError: a run has no readable record.
        OSError: `out_dir` cannot be written.
    """
    runs = _distinct_names([read_run(Path(run_dir)) for run_dir in run_dirs], run_dirs)
    out_dir.mkdir(parents=True, exist_ok=True)
    report = Report(*(out_dir / f"report.{kind}" for kind in ("png", "html", "json")))
    with whole(report.png) as png:
        draw(runs, _title(runs), png)
    with whole(report.html) as html:
        html.write_text(_page(runs, report.png.read_bytes()), encoding="utf-8")
    numbers = {run.name: run.summary() for run in runs}
    with whole(report.json) as partial:
        partial.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    return report


def _distinct_names(runs: Sequence[RunLog], run_dirs: Sequence[Path]) -> list[RunLog]:
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else replace(run, name=str(run_dir))
        for run, run_dir in zip(runs, run_dirs, strict=True)
    ]


def _page(runs: Sequence[RunLog], png: bytes) -> str:
    return PAGE.format(
        title=html.escape(_title(runs)),
        png=base64.b64encode(png).decode(),
        table=_table(runs),
        texts="\n".join(_texts(run) for run in runs),
    )


def _title(runs: Sequence[RunLog]) -> str:
    run = runs[0]
    if len(runs) > 1:
        return f"{len(runs)} runs"
    return f"{run.name} ({run.model})" if run.model not in (None, "", run.name) else run.name


def _table(runs: Sequence[RunLog]) -> str:
    summaries = [run.summary() for run in runs]
    rows = [_row("th", "", [html.escape(run.name) for run in runs])]
    for key, (title, show) in ROWS.items():
        values = [summary[key] for summary in summaries]
        if any(value is not None for value in values):
            rows.append(_row("td", title, ["–" if v is None else show(v) for v in values]))
    return "\n".join(rows)


def _row(tag: str, title: str, cells: Sequence[str]) -> str:
    return f"<tr><th>{title}</th>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"


def _texts(run: RunLog) -> str:
    return "\n".join(
        f"<h2>{html.escape(f'{name}, {run.name}, step {step}')}</h2><pre>{html.escape(text)}</pre>"
        for name, (step, text) in run.texts.items()
    )
