"""tools/convert_checkpoint.py: as a command where that matters, else in this process."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from safetensors.torch import save_file

from megatron_m1.checkpoint import lease, manifest
from megatron_m1.conversion import convert as converting
from megatron_m1.conversion import logits, verification
from megatron_m1.conversion.families import BY_NAME
from megatron_m1.conversion.recognition import checkpoint_weights, recognise
from megatron_m1.conversion.shards import DTYPES
from megatron_m1.errors import EXIT_INPUT, EXIT_STOPPED, EXIT_STORAGE
from parallel.layout import Layout
from tests.checkpoint.spoil import flip_bit
from tests.conversion import released
from tests.conversion.foreign import (
    assert_equal,
    export_checkpoint,
    import_folder,
    parameters_of,
    tensors_of,
    write_toy,
)
from tools import convert_checkpoint

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "tools/convert_checkpoint.py"]

Call = Callable[..., tuple[int, str, str]]
Done = Callable[..., str]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("source") / "toy")


@pytest.fixture(scope="module")
def imported(toy: Path) -> Path:
    return import_folder(toy, toy.parent / "imported")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Give the program some words; returns its exit code, output and errors."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            convert_checkpoint.main([*map(str, words)])
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def done(call: Call) -> Done:
    """The same for what must succeed; returns the output."""

    def run(*words: object) -> str:
        code, out, err = call(*words)
        assert code == 0, err
        return out

    return run


@pytest.fixture
def joined(single_process: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the logits: this process is in its groups already."""
    monkeypatch.setattr(logits, "_one_process", nullcontext)


def test_in_out_and_compared(toy: Path, tmp_path: Path, done: Done) -> None:
    checkpoint, folder = tmp_path / "checkpoint", tmp_path / "hf"
    assert "in 1 file\n" in done("import", "--hf", toy, "--out", checkpoint)
    told = done(
        *("export", "--ckpt", checkpoint, "--hf", folder, "--format", "transformers"),
        *("--shard-size", "100KB"),
    )
    assert str(folder) in told
    words = [*COMMAND, "verify", "--ckpt", checkpoint, "--hf", folder]
    ladder = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert [line.split()[1] for line in ladder.splitlines()] == ["ok"] * 5
    assert "largest difference" in ladder.splitlines()[-1]
    assert "imported from transformers" in done("inspect", checkpoint)
    assert json.loads(done("inspect", folder, "--json"))["problems"] == "none"


def test_verify_fails_where_the_sides_differ(imported: Path, tmp_path: Path, call: Call) -> None:
    folder = export_checkpoint(imported, tmp_path / "hf", "minimax_m1")
    flip_bit(sorted(folder.glob("*.safetensors"))[0])
    code, out, _ = call("verify", "--ckpt", imported, "--hf", folder)
    assert code == 1
    assert re.search(r"^values  FAILED   1 parameters differ: \S+ \(by up to", out, re.M)


def test_verify_fails_where_the_logits_differ(imported: Path, tmp_path: Path, joined: None) -> None:
    """Ours are computed from the checkpoint itself: here from another one."""
    folder = export_checkpoint(imported, tmp_path / "hf", "megatron_m1")
    tensors = tensors_of(folder)
    tensors["output_layer.weight"] = tensors["output_layer.weight"].roll(1, 0)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")
    other, given = import_folder(folder, tmp_path / "other"), recognise(folder)
    rows = logits.some_tokens(given.model)
    sides = verification.Sides(checkpoint_weights(other), given.weights)
    assert logits.compare_logits(sides, other, given, rows).outcome == verification.OK
    assert logits.compare_logits(sides, imported, given, rows).outcome == verification.FAILED


@pytest.mark.parametrize(("direction", "workers"), [("import", 1), ("export", 2)])
def test_a_killed_conversion_goes_on(
    direction: str, workers: int, toy: Path, imported: Path, tmp_path: Path, done: Done
) -> None:
    out = tmp_path / "out"
    ends = {"import": ("--hf", toy, "--out", out), "export": ("--ckpt", imported, "--hf", out)}
    words = (direction, *ends[direction], "--shard-size", "1KB", "--workers", workers)
    process = subprocess.Popen([*COMMAND, *map(str, words)], cwd=ROOT, stderr=subprocess.DEVNULL)
    journal = tmp_path / "out.partial" / ".journal.jsonl"
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
    again = out if direction == "import" else import_folder(out, tmp_path / "again")
    assert_equal(parameters_of(again), parameters_of(imported))


def test_an_interrupted_conversion_says_so(toy: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches all processes of a terminal."""
    words = ["import", "--hf", toy, "--out", tmp_path / "out", "--shard-size", "1KB"]
    process = subprocess.Popen(
        [*COMMAND, *map(str, words), "--workers", "2"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    journal = tmp_path / "out.partial" / ".journal.jsonl"
    wait_for(lambda: journal.exists() and len(journal.read_bytes().splitlines()) > 1)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED
    assert "convert_checkpoint: interrupted: the same command goes on with what is left\n" in said


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_another_job_does_not_go_on(toy: Path, tmp_path: Path, call: Call) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / ".journal.jsonl").write_text('{"job": {"source": "other"}}\n')
    code, _, said = call("import", "--hf", toy, "--out", tmp_path / "out")
    assert code == EXIT_INPUT
    assert "was begun from other weights or with other options" in said
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    _, _, said = call("import", "--hf", toy, "--out", tmp_path / "taken")
    assert "taken exists and is no empty folder" in said
    _, _, said = call("import", "--hf", toy, "--out", tmp_path / "taken/file")
    assert "taken/file exists and is no empty folder" in said


def test_a_dry_run_of_the_released_index(tmp_path: Path, call: Call, done: Done) -> None:
    folder = released.write_index(tmp_path / "m1")
    told = done("import", "--hf", folder, "--dry-run")
    assert "8,243 in 413 shards" in told
    assert "912,210,767,872 bytes" in told
    code, _, said = call("import", "--hf", folder, "--out", tmp_path / "out")
    assert code == EXIT_INPUT
    assert "lacks 413 of 413 shards: model-00000-of-00413.safetensors" in said


def test_the_parser_knows_every_format() -> None:
    assert tuple(BY_NAME) == convert_checkpoint.FORMATS
    assert tuple(DTYPES) == convert_checkpoint.DTYPES


def test_errors_are_one_sentence(toy: Path, imported: Path, tmp_path: Path, call: Call) -> None:
    outside = tmp_path / "outside.jsonl"
    outside.write_text("[1, 2, 64]")
    code, _, said = call("export", "--ckpt", tmp_path, "--hf", tmp_path / "hf")
    assert code == EXIT_INPUT
    assert said.startswith(f"convert_checkpoint: {tmp_path} holds no checkpoint: give")
    assert said.count("\n") == 1
    code, _, said = call("import", "--hf", toy, "--out", tmp_path, "--shard-size", "many")
    assert code == 2 and "many is not a size: 5GB and 500MB are" in said
    code, _, said = call("import", "--hf", toy, "--out", toy / "config.json/below")
    assert code == EXIT_STORAGE and f"cannot be written to {toy}/config.json: Not a dir" in said
    for words, sentence in (
        (("--tokens", tmp_path / "none.npy"), "none.npy cannot be read"),
        (("--tokens", outside), "outside.jsonl has ids outside the vocabulary 0..63"),
    ):
        code, out, said = call("verify", "--ckpt", imported, "--hf", toy, *words)
        assert (code, out) == (EXIT_INPUT, "") and sentence in said
    code, _, said = call("export", "--ckpt", imported, "--hf", tmp_path / "a", "--like", outside)
    assert code == EXIT_INPUT and said.endswith("outside.jsonl is no folder\n")
    code, _, said = call("inspect", outside)
    assert code == EXIT_INPUT and "outside.jsonl is no folder: give a checkpoint" in said
    code, _, said = call("import", "--hf", toy)
    assert code == EXIT_INPUT and "--out is missing: give the folder to write" in said


def test_the_wrong_way_round_is_told(toy: Path, imported: Path, tmp_path: Path, call: Call) -> None:
    """What the folder is, and which command is meant."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints/step_000001").symlink_to(imported)
    out = tmp_path / "out"
    foreign = f"{toy} is a folder of safetensors and no checkpoint of this project: make one of it"
    for words in (("export", "--ckpt", toy, "--hf", out), ("verify", "--ckpt", toy, "--hf", toy)):
        code, _, said = call(*words)
        assert code == EXIT_INPUT
        assert f"{foreign} by tools/convert_checkpoint.py import --hf {toy} --out CKPT" in said
    for ours in (imported, run):
        for words in (("import", "--out", out), ("verify", "--ckpt", imported)):
            code, _, said = call(*words, "--hf", ours)
            assert code == EXIT_INPUT
            assert f"{ours} holds a checkpoint of this project and no safetensors" in said
            assert f"convert_checkpoint.py export --ckpt {ours} --hf DIR" in said


def test_what_is_unfinished_is_told(tmp_path: Path, call: Call) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / ".journal.jsonl").touch()
    for words in (
        ("inspect", partial),
        ("import", "--hf", partial, "--out", tmp_path / "a"),
        ("export", "--ckpt", partial, "--hf", tmp_path / "a"),
    ):
        code, _, said = call(*words)
        assert code == EXIT_INPUT and "out.partial is of a conversion that is not finished" in said


def test_keys_that_are_not_known_can_be_left_out(toy: Path, tmp_path: Path, call: Call) -> None:
    folder = shutil.copytree(toy, tmp_path / "toy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "swirl": 3}))
    code, _, said = call("inspect", folder)
    assert code == EXIT_INPUT and "swirl=3 is not known" in said
    code, told, _ = call("inspect", folder, "--ignore-config-keys", "swirl")
    assert code == 0 and "problems    none" in told


@pytest.mark.parametrize("command", ["import", "export", "verify", "inspect"])
def test_help_has_an_example_and_explains_every_option(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        convert_checkpoint.main([command, "--help"])
    told = capsys.readouterr().out
    assert f"example: python tools/convert_checkpoint.py {command} " in " ".join(told.split())
    parser = convert_checkpoint.command_line()
    (chosen,) = [action.choices for action in parser._actions if action.choices]
    assert all(action.help for action in chosen[command]._actions)


def test_files_of_the_optimizer_alone_are_not_read(toy: Path, tmp_path: Path, done: Done) -> None:
    checkpoint = import_folder(toy, tmp_path / "checkpoint")
    files = manifest.read(checkpoint)
    assert files is not None
    files["__9_0.distcp"] = manifest.Entry(7, "0" * 64)
    (checkpoint / "manifest.json").write_bytes(manifest.as_bytes(files))
    done("export", "--ckpt", checkpoint, "--hf", tmp_path / "hf")


def test_a_damaged_checkpoint_is_not_converted(toy: Path, tmp_path: Path, call: Call) -> None:
    checkpoint, folder = import_folder(toy, tmp_path / "checkpoint"), tmp_path / "hf"
    flip_bit(checkpoint / "__0_0.distcp")
    for command, hf in (("export", folder), ("verify", toy)):
        code, out, said = call(command, "--ckpt", checkpoint, "--hf", hf)
        assert (code, out) == (EXIT_INPUT, "")
        assert "is damaged: __0_0.distcp does not have the SHA-256" in said
    assert not folder.exists()


def test_what_is_converted_is_not_removed_meanwhile(
    toy: Path, imported: Path, tmp_path: Path, done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def noting(result: object) -> Callable[..., object]:
        def note(*arguments: object) -> object:
            found.append(lease.is_read(imported))
            return result

        return note

    monkeypatch.setattr(converting, "convert", noting(0))
    monkeypatch.setattr(verification, "climb", noting([]))
    done("export", "--ckpt", imported, "--hf", tmp_path / "hf")
    done("verify", "--ckpt", imported, "--hf", toy)
    assert found == [True, True]
    assert not lease.is_read(imported)


def test_a_full_disk_is_said_and_the_rest_is_written_later(
    toy: Path, imported: Path, tmp_path: Path, done: Done
) -> None:
    """The system allows files of 16 kB, as a full disk would at some point."""
    out = tmp_path / "checkpoint"
    words = ["import", "--hf", toy, "--out", out, "--shard-size", "20KB"]
    limited = ["bash", "-c", 'ulimit -f 16; exec "$@"', "-", *COMMAND, *map(str, words)]
    refused = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert refused.returncode == EXIT_STORAGE
    assert "cannot be written to" in refused.stderr and "ulimit -f" in refused.stderr
    assert not out.exists()
    done(*words)
    assert_equal(parameters_of(out), parameters_of(imported))


def test_the_commands_of_the_page(
    toy: Path, tmp_path: Path, done: Done, joined: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the page, on a small model in the place of the released one."""
    checkpoint = import_folder(toy, tmp_path / "runs/tiny/checkpoints/step_000001")
    (checkpoint.parent / "latest").write_text(checkpoint.name)
    export_checkpoint(checkpoint, tmp_path / "MiniMax-M1-80k", "minimax_m1")
    page = (ROOT / "docs/checkpoints.md").read_text()
    commands = re.findall(r"^\.venv/bin/python tools/convert_checkpoint\.py (.*)$", page, re.M)
    assert len(commands) == 5
    monkeypatch.chdir(tmp_path)
    for command in commands:
        told = done(*shlex.split(command))
    assert "minimax_m1 (MiniMaxM1ForCausalLM)" in told
