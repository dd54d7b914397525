"""tools/mismatch.py as it is called from a shell, and the numbers of tools/precision.py."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
import torch

from megatron_m1.errors import EXIT_INPUT, EXIT_USAGE
from megatron_m1.model.build import build_chunks, forward_row
from megatron_m1.model.transformer_config import transformer_config
from megatron_m1.observe.run_log import read_run
from megatron_m1.observe.sinks.json_lines import JsonLines
from parallel.layout import Layout
from parallel.packing import PackedRow
from tests.distributed import Pool
from tests.inference.trained import train_and_save
from tests.training.small_run import MODEL
from tools.mismatch import main
from tools.precision import add_common_logit
from tools.precision_figure import CORRELATION, DIFFERENCE, HEADS, Measured, draw_figure

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(ranks: Callable[[int], Pool], tmp_path_factory: pytest.TempPathFactory) -> Path:
    (path,) = ranks(1).run(train_and_save, str(tmp_path_factory.mktemp("run")))
    return path


def prompts(folder: Path, *rows: list[int]) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"tokens={path}"


def test_tables_and_numbers(checkpoint: Path, tmp_path: Path) -> None:
    given = [f"checkpoint.load={checkpoint}", prompts(tmp_path, [1, 2, 3], [5] * 20)]
    options = ["new_tokens=6", "precision=bf16", "fp32_lm_head=false", "prefill_tokens=8"]
    command = [sys.executable, "tools/mismatch.py", *given, *options]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "found.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert "No module adds more than the order of sums explains." in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["first"] is None
    assert len(found["modules"]) == 1 + 5 * MODEL.num_layers + 3
    assert set(found["without"]) == {module["kind"] for module in found["modules"][:-1]}
    # The head is BF16 too, and its arithmetic is granted.
    (head,) = (module for module in found["modules"] if module["kind"] == "head")
    assert head["arithmetic"] > 1e-2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["new_tokens=0", "precision=fp8"], EXIT_USAGE, "new_tokens=0 must be at least 1"),
        (["checkpoint.load=a", "tokens=a.txt"], EXIT_USAGE, "tokens=a.txt: give tokens=FILE.npy"),
        (["fp32_head=true"], EXIT_USAGE, "unknown key fp32_head: did you mean fp32_lm_head"),
        (["checkpoint.load=nowhere", "tokens=nowhere.npy"], EXIT_INPUT, "tokens=nowhere.npy"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    assert message in capsys.readouterr().err


def test_one_process_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["checkpoint.load=a", "tokens=a.npy"]) == EXIT_USAGE
    assert "2 processes were started: the comparison runs in one" in capsys.readouterr().err


def test_a_common_logit_changes_no_probability(single_process: Layout) -> None:
    row = PackedRow.from_documents([torch.arange(30) % MODEL.vocab_size])
    model = replace(MODEL, fp32_lm_head=True)
    (chunk,) = build_chunks(model, transformer_config(model, Layout()), seed=1)
    found = []
    for size in (0.0, 32.0):
        add_common_logit(chunk, size)
        with torch.no_grad():
            logits = forward_row(chunk.eval(), row, with_loss=False)[0]
        found.append((logits.log_softmax(-1), logits.abs().max()))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=0)
    assert found[1][1] > 4 * found[0][1]


def test_figure_shows_every_pair_of_heads(tmp_path: Path) -> None:
    found = [
        Measured(
            ", ".join(heads), size, 10 + size, {CORRELATION: 0.9, DIFFERENCE: 0.1}, [0.5], [0.4]
        )
        for heads in HEADS
        for size in (0.0, 16.0)
    ]
    sink = JsonLines(tmp_path, None)
    for step in range(1, 6):
        sink.log(step, {"train/step": step, "critic/rewards/mean": 0.1 * step})
    sink.close()
    draw_figure(found, [read_run(tmp_path)], tmp_path / "figure.png")
    assert matplotlib.image.imread(tmp_path / "figure.png").shape[:2] == (900, 1500)
