"""The sinks of a run, each as it really is; nothing here talks to another machine."""

import json
import logging
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_m1.errors import InputError
from megatron_m1.observe.records import read_records
from megatron_m1.observe.sinks import FanOut, open_sinks
from megatron_m1.observe.sinks.json_lines import JsonLines
from megatron_m1.observe.sinks.tensorboard import TensorBoard
from megatron_m1.observe.sinks.wandb import Wandb, choose_mode

METRICS = {
    "train/loss": 3.25,
    "moe/load": [[0.25, 0.75], [0.5, 0.5]],
}


class Failing:
    """Counts its calls and fails on the second step."""

    def __init__(self):
        self.steps, self.closed = [], 0

    def log(self, step, metrics):
        self.steps.append(step)
        if step == 2:
            raise ValueError("the server is gone")

    def text(self, step, name, text):
        pass

    def close(self):
        self.closed += 1


def config(**changes):
    defaults = {
        "console": False,
        "wandb": "disabled",
        "wandb_project": "tests",
        "wandb_entity": None,
        "wandb_name": None,
        "tensorboard": False,
    }
    return SimpleNamespace(**defaults | changes)


def steps_of(run_dir):
    return [record["step"] for record in read_records(run_dir / "metrics.jsonl")]


def test_json_lines_are_on_disk_at_once_and_come_back_equal(tmp_path):
    sink = JsonLines(tmp_path, resumed_step=None)
    sink.log(1, METRICS)
    sink.text(1, "sample", "once\nupon")

    first, second = read_records(tmp_path / "metrics.jsonl")
    assert first == {"step": 1, **METRICS}
    assert second == {"step": 1, "text": {"sample": "once\nupon"}}
    sink.close()


def test_json_lines_stay_valid_json_with_nan_and_infinity(tmp_path):
    sink = JsonLines(tmp_path, resumed_step=None)
    nan, inf = float("nan"), float("inf")
    sink.log(1, {"train/loss": nan, "optim/grad_norm": inf, "moe/load": [[nan, -inf]]})
    sink.close()

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    parsed = json.loads(line, parse_constant=refuse)
    assert (parsed["train/loss"], parsed["optim/grad_norm"]) == ("nan", "inf")
    assert parsed["moe/load"] == [["nan", "-inf"]]
    (record,) = read_records(tmp_path / "metrics.jsonl")
    assert record["optim/grad_norm"] == inf
    assert record["moe/load"][0][1] == -inf


def test_resume_drops_later_steps_and_a_torn_line(tmp_path):
    sink = JsonLines(tmp_path, resumed_step=None)
    for step in range(1, 6):
        sink.log(step, {"train/loss": 1 / step})
    sink.close()
    path = tmp_path / "metrics.jsonl"
    kept = path.read_text().splitlines()[:3]
    path.write_text(path.read_text() + '{"step": 6, "train/lo')

    resumed = JsonLines(tmp_path, resumed_step=3)
    assert path.read_text().splitlines() == kept
    resumed.log(4, {"train/loss": 0.2})
    resumed.close()
    assert steps_of(tmp_path) == [1, 2, 3, 4]


def test_new_run_in_a_used_folder_keeps_the_old_records_aside(tmp_path):
    for loss in (1.0, 2.0):
        sink = JsonLines(tmp_path, resumed_step=None)
        sink.log(1, {"train/loss": loss})
        sink.close()
    assert [r["train/loss"] for r in read_records(tmp_path / "metrics.jsonl")] == [2.0]
    assert [r["train/loss"] for r in read_records(tmp_path / "metrics.jsonl.old")] == [1.0]


def test_failing_sink_is_reported_once_and_the_others_go_on(tmp_path, caplog):
    failing = Failing()
    sinks = FanOut([failing, JsonLines(tmp_path, None)])
    with caplog.at_level(logging.WARNING):
        for step in range(1, 5):
            sinks.log(step, METRICS)
        sinks.close()
        sinks.close()

    assert steps_of(tmp_path) == [1, 2, 3, 4]
    assert failing.steps == [1, 2]
    assert failing.closed == 1
    (warning,) = caplog.messages
    assert "Failing" in warning
    assert "the server is gone" in warning


def test_sink_that_cannot_start_is_left_out(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        sinks = open_sinks(config(tensorboard=True), tmp_path, 10, {}, None)
    sinks.log(1, METRICS)
    sinks.close()
    assert steps_of(tmp_path) == [1]
    (warning,) = caplog.messages
    assert "TensorBoard cannot start" in warning


def test_run_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot keep metrics"):
        open_sinks(config(), tmp_path / "file" / "run", 10, {}, None)


def test_tensorboard_files_hold_scalars_and_a_resumed_run_replaces_later_steps(tmp_path):
    first = TensorBoard(tmp_path, resumed_step=None)
    for step in range(1, 6):
        first.log(step, METRICS | {"train/loss": 1.0})
    first.text(5, "sample", "once upon")
    first.close()
    resumed = TensorBoard(tmp_path, resumed_step=3)
    resumed.log(4, {"train/loss": 2.0})
    resumed.close()

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert points == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]
    assert "moe/load" not in events.Tags()["scalars"]


def test_wandb_offline_run_resumes_under_the_same_id(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for step in (1, 2):
        sink = Wandb(config(wandb="offline"), tmp_path, {"model": {"name": f"tiny-{step}"}})
        sink.log(step, METRICS)
        sink.text(step, "sample", "once <upon>")
        sink.close()

    import wandb

    wandb.teardown()
    run_id = (tmp_path / "wandb_id").read_text()
    kept = list(tmp_path.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(kept) == 2
    assert all(b"train/loss" in path.read_bytes() for path in kept)
    assert not any(b"moe/load" in path.read_bytes() for path in kept)
    assert len("".join(capfd.readouterr())) < 200


def test_wandb_is_online_only_where_a_key_is_configured(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    assert choose_mode("auto") == "offline"
    netrc.write_text("machine api.wandb.ai login user password not-a-real-key\n")
    assert choose_mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert choose_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "not-a-real-key")
    assert choose_mode("auto") == "online"
    assert choose_mode("offline") == "offline"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert choose_mode("auto") is None
