"""Responses on disk, whatever ended the process that wrote them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from megatron_m1.rl.journal import Journal, forget, step_file
from megatron_m1.rl.samples import Response


def response(index: int, **changes: object) -> Response:
    values = {
        "tokens": [5, 6, 7],
        "logprobs": [-0.1, -1 / 3, -2.0],
        "raw_logprobs": [-0.2, -1 / 7, float("-inf")],
        "versions": [1, 1, 2],
        "finish": "stop",
    }
    return Response(prompt_id=3, index=index, **{**values, **changes})  # type: ignore[arg-type]


def reopened(folder: Path, fingerprint: str = "a") -> Journal:
    journal = Journal(folder, 4, fingerprint)
    journal.close()
    return journal


def test_a_disk_that_takes_a_line_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, write = Journal(tmp_path, 4, "a"), os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda file, data: write(file, data[:7]))
        journal.add_response(response(0))
        journal.add_response(response(1))
    journal.close()
    assert set(reopened(tmp_path).responses) == {(3, 0), (3, 1)}


def test_what_was_written_is_read_exactly(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 4, "a")
    experts = torch.arange(12, dtype=torch.int16).reshape(3, 2, 2)
    journal.add_response(response(0))
    journal.add_response(response(1, finish="paused", experts=experts))
    journal.add_reward((3, 0), {"reward": 0.1, "details": {"format": 1.0}, "failed": False})
    journal.close()

    found = reopened(tmp_path)
    assert found.responses[3, 0] == response(0)
    assert found.responses[3, 1].finish == "paused"
    assert torch.equal(found.responses[3, 1].experts, experts)
    assert found.rewards == {(3, 0): {"reward": 0.1, "details": {"format": 1.0}, "failed": False}}


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_costs_that_line_only(tmp_path: Path, cut: int) -> None:
    journal = Journal(tmp_path, 4, "a")
    for index in range(3):
        journal.add_response(response(index))
    journal.close()
    path = step_file(tmp_path, 4)
    path.write_bytes(path.read_bytes()[:-cut])

    found = Journal(tmp_path, 4, "a")
    assert sorted(found.responses) == [(3, 0), (3, 1)]
    found.add_response(response(2))
    found.close()
    assert sorted(reopened(tmp_path).responses) == [(3, 0), (3, 1), (3, 2)]


def test_a_torn_first_line_is_a_new_file(tmp_path: Path) -> None:
    step_file(tmp_path, 4).write_text('{"finger')
    assert reopened(tmp_path).responses == {}
    journal = Journal(tmp_path, 4, "a")
    journal.add_response(response(0))
    journal.close()
    assert list(reopened(tmp_path).responses) == [(3, 0)]


def test_a_damaged_line_in_the_middle_costs_that_line_only(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 4, "a")
    for index in range(3):
        journal.add_response(response(index))
    journal.close()
    path = step_file(tmp_path, 4)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2][:20] + "\n", *lines[3:]]))
    assert sorted(reopened(tmp_path).responses) == [(3, 0), (3, 2)]


def test_responses_of_another_run_are_not_taken(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 4, "a")
    journal.add_response(response(0))
    journal.close()
    assert reopened(tmp_path, "b").responses == {}
    assert reopened(tmp_path, "a").responses == {}


def test_files_that_no_checkpoint_needs_go(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        Journal(tmp_path, step, "a").close()
    (tmp_path / "step_notes.jsonl").write_text("mine")
    forget(tmp_path, before=3)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step_000003.jsonl", "step_notes.jsonl"]
