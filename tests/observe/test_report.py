"""The report of synthetic runs."""

import json
import math

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from megatron_m1.errors import InputError
from megatron_m1.observe.report import write_report
from megatron_m1.observe.run_log import Curve, read_run
from megatron_m1.observe.sinks.json_lines import JsonLines


def write_run(run_dir, steps=60, layers=4, experts=8):
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("model: {name: toy & co, layer_pattern: LS}\n")
    load = np.random.default_rng(0).dirichlet(np.full(experts, 20.0), size=layers)
    sink = JsonLines(run_dir, None)
    for step in range(1, steps + 1):
        metrics = {
            "train/step": step,
            "train/loss": math.nan if step == 30 else 3 + 5 * math.exp(-step / 15),
            "train/tokens": 1024 * step,
            "optim/lr": 1e-3 * min(1, step / 10),
            "optim/grad_norm": 1 + 1 / step,
            "perf/tokens_per_s": 2048.0,
            "time/step": 0.5,
            "moe/max_violation": float(load.max() * experts - 1),
            "moe/load": load.tolist(),
        }
        sink.log(step, metrics)
        if step % 20 == 0:
            sink.log(step, {"val/loss": 5 - step / 20, "val/ppl": 1.0})
    sink.text(steps, "sample", "once <upon> a time")
    sink.close()
    return run_dir


def test_report_of_one_run_has_a_figure_a_page_and_the_numbers(tmp_path):
    run = write_run(tmp_path / "first")
    report = write_report([run], tmp_path / "out")

    pixels = matplotlib.image.imread(report.png)
    assert pixels.shape[:2] == (800, 1400)
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 100
    numbers = json.loads(report.json.read_text())["first"]
    assert numbers["steps"] == 60
    assert numbers["first_loss"] == pytest.approx(3 + 5 * math.exp(-1 / 15))
    assert (numbers["best_val_loss"], numbers["best_val_step"]) == (2.0, 60)
    assert numbers["tokens"] == 61440
    assert numbers["tokens_per_s_median"] == 2048
    assert numbers["wall_time_s"] == 30
    assert numbers["mfu_median"] is None


def test_page_needs_nothing_else_and_escapes_what_it_shows(tmp_path):
    report = write_report([write_run(tmp_path / "first")], tmp_path)
    page = report.html.read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page
    assert "first (toy &amp; co)" in page
    assert "once &lt;upon&gt; a time" in page
    assert "0:00:30" in page
    assert "MFU" not in page


RL_PANELS = {
    "Reward": "critic/rewards/mean",
    "Length": "response_length/mean",
    "Entropy": "actor/entropy",
    "Clip fraction": "actor/pg_clipfrac",
    "Mismatch": "training/rollout_probs_diff_mean",
}


def write_rl_run(run_dir, steps=30):
    """Step 7 found no batch to train on: it has no entropy, clip fraction or mismatch."""
    run_dir.mkdir()
    sink = JsonLines(run_dir, None)
    for step in range(1, steps + 1):
        metrics = {
            "train/step": step,
            "critic/rewards/mean": step / steps,
            "response_length/mean": 40.0 + step,
            "timing_s/step": 2.0,
        }
        if step != 7:
            metrics |= {
                "actor/entropy": 2 - step / steps,
                "actor/pg_clipfrac": 0.01 * (step % 3),
                "training/rollout_probs_diff_mean": 1e-4 * step,
                "training/rollout_probs_diff_max": 1e-3 * step,
                "training/rollout_actor_probs_pearson_corr": 1 - 1e-5 * step,
            }
        sink.log(step, metrics)
    sink.close()
    return run_dir


def test_report_of_rl_has_its_curves_and_its_numbers(tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path: drawn.append(figure) or save(figure, path)
    )
    run = write_rl_run(tmp_path / "rl")
    report = write_report([run], tmp_path / "out")

    panels = {axis.get_title(loc="left"): axis for axis in drawn[0].axes}
    assert list(panels) == list(RL_PANELS)
    for title, metric in RL_PANELS.items():
        raw, smooth = panels[title].lines
        expected = read_run(run).curve(metric)
        np.testing.assert_array_equal(raw.get_xdata(), expected.steps)
        np.testing.assert_array_equal(raw.get_ydata(), expected.values)
        assert len(smooth.get_xdata()) > 10
        low, high = panels[title].get_ylim()
        assert low == 0 and high >= np.median(expected.values)
    assert len(panels["Entropy"].lines[0].get_xdata()) == 29

    numbers = json.loads(report.json.read_text())["rl"]
    assert numbers["first_reward"] == pytest.approx(5.5 / 30)
    assert numbers["last_reward"] == pytest.approx(25.5 / 30)
    assert numbers["last_length"] == 70
    assert numbers["last_entropy"] == pytest.approx(1)
    assert numbers["clip_fraction_median"] == pytest.approx(0.01)
    assert numbers["probs_diff_max"] == pytest.approx(0.03)
    assert numbers["pearson_min"] == pytest.approx(1 - 3e-4)
    assert (numbers["wall_time_s"], numbers["last_loss"]) == (60, None)
    page = report.html.read_text()
    assert "rollout against trainer, lowest correlation" in page and "last loss" not in page


def test_several_runs_share_one_report(tmp_path):
    (tmp_path / "other").mkdir()
    runs = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", 20),
        write_run(tmp_path / "other/a"),
    ]
    report = write_report(runs, tmp_path / "out")
    numbers = json.loads(report.json.read_text())
    assert list(numbers) == [str(runs[0]), "b", str(runs[2])]
    assert numbers["b"]["steps"] == 20


def test_layers_of_the_load_are_named_by_the_pattern(tmp_path):
    run = read_run(write_run(tmp_path / "first"))
    assert run.layer_kinds == "LSLS"
    assert run.load.shape == (4, 8)
    assert run.load.sum(axis=1) == pytest.approx(np.ones(4))
    (tmp_path / "first/config.yaml").write_text("model: [broken")
    assert read_run(tmp_path / "first").layer_kinds == ""


def test_half_a_last_line_is_left_out(tmp_path):
    run = write_run(tmp_path / "first")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "train/loss": 3.')
    write_report([run], run)
    assert read_run(run).summary()["steps"] == 60


def test_run_with_little_to_tell_still_has_a_report(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": "nan"}\n')
    report = write_report([tmp_path], tmp_path)
    assert json.loads(report.json.read_text())[tmp_path.name]["last_loss"] is None


@pytest.mark.parametrize("content", [None, "", '{"step": 1'])
def test_run_without_records_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(InputError, match="metrics.jsonl"):
        write_report([tmp_path], tmp_path)
    assert not (tmp_path / "report.png").exists()


def test_smoothing_takes_out_a_spike_and_keeps_the_ends_in_place():
    values = np.linspace(9.0, 1.0, 81)
    values[40] = 1000.0
    smooth = Curve(np.arange(81), values).smoothed(9)
    assert smooth.values[0] == 9.0
    assert smooth.values.max() == 9.0
    assert np.abs(smooth.values - np.linspace(9.0, 1.0, 81)).max() < 0.3
