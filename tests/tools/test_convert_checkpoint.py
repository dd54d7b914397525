"""tools/convert_checkpoint.py as it is called from a shell in the root of the repository."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_m1.errors import EXIT_INPUT, EXIT_STORAGE
from tests.conversion import released
from tests.conversion.foreign import (
    assert_equal,
    export_checkpoint,
    import_folder,
    parameters_of,
    write_toy,
)

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "tools/convert_checkpoint.py"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("source") / "toy")


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [*COMMAND, *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)


def done(*arguments: object) -> str:
    result = call(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_in_out_and_compared(toy: Path, tmp_path: Path) -> None:
    checkpoint, folder = tmp_path / "checkpoint", tmp_path / "hf"
    assert "in 1 file\n" in done("import", "--hf", toy, "--out", checkpoint)
    told = done(
        *("export", "--ckpt", checkpoint, "--hf", folder, "--format", "transformers"),
        *("--shard-size", "100KB", "--workers", 2),
    )
    assert str(folder) in told
    ladder = done("verify", "--ckpt", checkpoint, "--hf", folder)
    assert [line.split()[1] for line in ladder.splitlines()] == ["ok"] * 5
    assert "largest difference" in ladder.splitlines()[-1]
    assert "imported from transformers" in done("inspect", checkpoint)
    assert json.loads(done("inspect", folder, "--json"))["problems"] == "none"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_import_goes_on(workers: int, toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "checkpoint"
    words = ("import", "--hf", toy, "--out", out, "--shard-size", "1KB", "--workers", workers)
    process = subprocess.Popen([*COMMAND, *map(str, words)], cwd=ROOT, stderr=subprocess.DEVNULL)
    journal = tmp_path / "checkpoint.partial" / ".journal.jsonl"
    wait_for(lambda: journal.exists() and len(journal.read_bytes().splitlines()) > 5)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    finished = {json.loads(line).get("file") for line in journal.read_bytes().splitlines()[:6]}
    changed = journal.parent / (finished - {None}).pop()
    times = {p: p.stat().st_mtime_ns for p in journal.parent.iterdir() if p.name in finished}
    changed.write_bytes(b"damaged")

    time.sleep(1)  # workers follow the process that started them
    assert "from an earlier start" in done(*words)
    # Only what the journal does not vouch for is written again.
    for path, before in times.items():
        is_kept = (out / path.name).stat().st_mtime_ns == before
        assert is_kept == (path != changed)
    assert not journal.parent.exists()
    assert_equal(parameters_of(out), parameters_of(import_folder(toy, tmp_path / "straight")))


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_another_job_does_not_go_on(toy: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / ".journal.jsonl").write_text('{"job": {"source": "other"}}\n')
    refused = call("import", "--hf", toy, "--out", tmp_path / "out")
    assert refused.returncode == EXIT_INPUT
    assert "was begun from other weights or with other options" in refused.stderr
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    refused = call("import", "--hf", toy, "--out", tmp_path / "taken")
    assert "taken exists and is not empty" in refused.stderr


def test_a_dry_run_of_the_released_index(tmp_path: Path) -> None:
    folder = released.write_index(tmp_path / "m1")
    told = done("import", "--hf", folder, "--dry-run")
    assert "8,243 in 413 shards" in told
    assert "912,210,767,872 bytes" in told
    refused = call("import", "--hf", folder, "--out", tmp_path / "out")
    assert refused.returncode == EXIT_INPUT
    assert "lacks 413 of 413 shards: model-00000-of-00413.safetensors" in refused.stderr


def test_errors_are_one_sentence(toy: Path, tmp_path: Path) -> None:
    refused = call("export", "--ckpt", tmp_path, "--hf", tmp_path / "hf")
    assert refused.returncode == EXIT_INPUT
    assert refused.stderr.startswith(f"convert_checkpoint: {tmp_path} holds no checkpoint: give")
    assert refused.stderr.count("\n") == 1
    wrong = call("import", "--hf", toy, "--out", tmp_path / "out", "--shard-size", "many")
    assert wrong.returncode == 2 and "many is not a size: 5GB and 500MB are" in wrong.stderr


def test_a_damaged_checkpoint_is_not_exported(toy: Path, tmp_path: Path) -> None:
    checkpoint = import_folder(toy, tmp_path / "checkpoint")
    file = checkpoint / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    refused = call("export", "--ckpt", checkpoint, "--hf", tmp_path / "hf")
    assert refused.returncode == EXIT_INPUT
    assert "is damaged: __0_0.distcp does not have the SHA-256" in refused.stderr
    assert not (tmp_path / "hf").exists()


def test_a_full_disk_is_said_and_the_rest_is_written_later(toy: Path, tmp_path: Path) -> None:
    """The system allows files of 40 kB, as a full disk would at some point."""
    out = tmp_path / "checkpoint"
    words = ["import", "--hf", toy, "--out", out, "--shard-size", "20KB"]
    limited = ["bash", "-c", 'ulimit -f 16; exec "$@"', "-", *COMMAND, *map(str, words)]
    refused = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert refused.returncode == EXIT_STORAGE
    assert "cannot be written to" in refused.stderr and "ulimit -f" in refused.stderr
    assert not out.exists()
    done(*words)
    assert_equal(parameters_of(out), parameters_of(import_folder(toy, tmp_path / "straight")))


def test_the_commands_of_the_page(toy: Path, tmp_path: Path) -> None:
    """In the order of the page, on a small model in the place of the released one."""
    checkpoint = import_folder(toy, tmp_path / "runs/tiny/checkpoints/step_000001")
    (checkpoint.parent / "latest").write_text(checkpoint.name)
    export_checkpoint(checkpoint, tmp_path / "MiniMax-M1-80k", "minimax_m1")
    page = (ROOT / "docs/checkpoints.md").read_text()
    commands = re.findall(r"^\.venv/bin/python (tools/convert_checkpoint\.py .*)$", page, re.M)
    assert len(commands) == 5
    for command in commands:
        tool, *words = shlex.split(command)
        ran = subprocess.run(
            [sys.executable, ROOT / tool, *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ran.returncode == 0, ran.stderr
    assert "minimax_m1 (MiniMaxM1ForCausalLM)" in ran.stdout
