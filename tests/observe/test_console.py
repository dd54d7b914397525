"""What a reader sees of a run, on a terminal and in a log file."""

import io

import pytest

from megatron_m1.observe.sinks.console import PlainLines, open_console
from megatron_m1.observe.sinks.console_line import Pace

METRICS = {
    "train/loss": 3.25,
    "optim/grad_norm": 0.5,
    "optim/lr": 3e-4,
    "perf/tokens_per_s": 12345.6,
    "time/step": 0.5,
    "moe/load": [[0.25, 0.75], [0.5, 0.5]],
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_console_prints_first_last_and_evaluation_in_fixed_order():
    stream = io.StringIO()
    sink = PlainLines(1000, stream, interval_s=60)
    for step in range(1, 1001):
        sink.log(step, dict(reversed(METRICS.items())))
        if step == 500:
            sink.log(step, {"val/loss": 3.0, "val/ppl": 20.1})
    sink.close()

    first, evaluation, last = stream.getvalue().splitlines()
    assert first == (
        "step    1/1000 | loss 3.2500 | grad norm 0.500 | lr 3.00e-04 | 12,346 tokens/s"
        " | time 0.50 s | ETA ?"
    )
    assert evaluation.startswith("step  500/1000 | val loss 3.0000 | val ppl 20.10")
    assert last.startswith("step 1000/1000") and last.endswith("ETA 0:00:00")


def test_plain_console_prints_the_last_step_of_a_run_that_ends_early():
    stream = io.StringIO()
    sink = PlainLines(1000, stream, interval_s=60)
    for step in (1, 2, 3):
        sink.log(step, METRICS | {"perf/mfu": 0.412})
    sink.close()
    assert stream.getvalue().splitlines()[-1].startswith("step    3/1000")
    assert "MFU 41.2%" in stream.getvalue()


def test_plain_console_cannot_be_steered_by_a_sample():
    stream = io.StringIO()
    PlainLines(10, stream).text(5, "sample", "red \x1b[31m\nnext")
    assert stream.getvalue() == "--- sample, step 5 ---\nred \ufffd[31m\nnext\n"


def test_terminal_gets_a_bar_and_ten_permanent_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    sink = open_console(200, stream)
    for step in range(1, 201):
        sink.log(step, METRICS)
    sink.text(200, "sample", "[bold]once\x1b[31m")
    sink.close()

    shown = stream.getvalue()
    assert "━" in shown
    assert shown.count("| grad norm 0.500 |") == 11  # the first step and each tenth
    assert "[bold]once\ufffd[31m" in shown
    assert "\x1b[?25h" in shown  # the cursor is visible again


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["log file", "dumb terminal"])
def test_no_bar_where_it_cannot_be_drawn(stream, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_console(10, stream), PlainLines)


def test_time_left_follows_the_last_steps(monkeypatch):
    clock = iter([0.0, 100.0, 200.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    pace = Pace(total_steps=100)
    for step in (10, 11, 12):
        pace.mark(step)
    assert pace.eta() == "2:26:40"
