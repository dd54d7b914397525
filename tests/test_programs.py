"""The programs as a user starts them: what they write, say, and end with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megatron_m1 import generate, score
from megatron_m1.config import GenerateConfig, LoadConfig, ScoreConfig
from megatron_m1.data.indexed import IndexedWriter
from megatron_m1.data.tokenizer import train_bpe
from megatron_m1.errors import EXIT_INPUT, EXIT_USAGE, InputError

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
PROMPT = "def f(x, "
TEXTS = [path.read_text() for path in sorted(Path(json.__file__).parent.glob("*.py"))]


@dataclass(frozen=True)
class World:
    """Text, a tokenizer, and a run trained on them for three steps."""

    data: Path
    run: Path


@dataclass(frozen=True)
class Generated:
    """What a program printed, as it came: each piece with whether the program still ran."""

    pieces: list[tuple[str, bool]]
    errors: str

    @property
    def text(self) -> str:
        return "".join(piece for piece, _ in self.pieces)


def start(program: str, *arguments: str, torchrun: bool = False) -> subprocess.Popen[str]:
    launcher = TORCHRUN if torchrun else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", f"megatron_m1.{program}", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(program: str, *arguments: str, torchrun: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, or end it and all that it started after two minutes."""
    process = start(program, *arguments, torchrun=torchrun)
    try:
        output, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    data, folder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("runs") / "first"
    tokenizer = train_bpe(TEXTS, 320)
    tokenizer.save(data)
    with IndexedWriter(data / "text", 320) as writer:
        for text in TEXTS:
            writer.add([*tokenizer.encode(text), tokenizer.eod])
    ended = run(
        "pretrain",
        "model=tiny",
        "model.num_layers=2",
        "model.layer_pattern=LS",
        "model.vocab_size=320",
        "data=indexed",
        f"data.train=[{data}/text]",
        f"data.tokenizer={data}",
        "train.steps=3",
        "train.seq_length=64",
        "train.micro_batch=2",
        "logger=quiet",
        f"run_dir={folder}",
    )
    assert ended.returncode == 0, ended.stderr
    return World(data, folder)


@pytest.fixture(scope="module")
def generated(world: World) -> Generated:
    process = start("generate", *generation(world))
    assert process.stdout is not None and process.stderr is not None
    pieces = []
    while piece := os.read(process.stdout.fileno(), 1000):
        pieces.append((piece.decode(), process.poll() is None))
    errors = process.stderr.read()
    assert process.wait(timeout=60) == 0, errors
    return Generated(pieces, errors)


def generation(world: World) -> list[str]:
    return [f"checkpoint.load={world.run}", f"prompt={PROMPT}", "max_new_tokens=20"]


def test_pretrain_leaves_a_run(world: World) -> None:
    records = [json.loads(line) for line in (world.run / "metrics.jsonl").open()]
    assert [record["step"] for record in records if "train/loss" in record] == [1, 2, 3]
    assert "num_layers: 2" in (world.run / "config.yaml").read_text()
    assert (world.run / "report.png").stat().st_size > 10_000
    checkpoints = world.run / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_000003"]


def test_generate_streams_while_it_runs(generated: Generated) -> None:
    assert generated.errors == ""
    assert generated.text.startswith(PROMPT)
    (first, running), *rest = generated.pieces
    assert running and len(first) < len(generated.text) / 2
    assert len(rest) > 5


def test_generate_over_two_processes_writes_the_same_text_once(
    world: World, generated: Generated
) -> None:
    ended = run("generate", *generation(world), "parallel.tp=2", torchrun=True)
    assert (ended.returncode, ended.stdout) == (0, generated.text), ended.stderr


def test_score_writes_only_its_file(world: World, tmp_path: Path) -> None:
    ids = np.arange(12, dtype=np.int32).reshape(2, 6)
    np.save(tmp_path / "ids.npy", ids)
    before = sorted(world.run.rglob("*"))
    ended = run(
        "score",
        f"checkpoint.load={world.run}",
        f"tokens={tmp_path}/ids.npy",
        f"out={tmp_path}/out.npy",
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    scores = np.load(tmp_path / "out.npy")
    assert scores.shape == (2, 5) and scores.dtype == np.float32
    assert (scores < 0).all() and (scores > -20).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.npy", "out.npy"]
    assert sorted(world.run.rglob("*")) == before


def test_over_several_processes_one_prints_the_error() -> None:
    ended = run("pretrain", "parallel.tp=4", "optim.eps=0", torchrun=True)
    assert ended.returncode != 0
    said = [line for line in ended.stderr.splitlines() if line.startswith("error")]
    assert len(said) == len(set(said))
    assert any("2 processes cannot be divided by parallel.tp*cp*pp" in line for line in said)
    assert "error: optim.eps=0.0 must be positive" in said
    # torchrun adds a traceback of its own, in which no file of ours stands.
    assert str(ROOT / "megatron_m1") not in ended.stderr


def test_a_wrong_file_has_an_exit_code_of_its_own(tmp_path: Path) -> None:
    ended = run("score", "checkpoint.load=a", "tokens=a.npy", f"out={tmp_path}/no/out.npy")
    assert ended.returncode == EXIT_INPUT
    assert ended.stderr == (
        f"error: out={tmp_path}/no/out.npy cannot be written: there is no folder {tmp_path}/no\n"
    )


def test_what_is_missing_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    nowhere = LoadConfig(load=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="checkpoint.load=.*nowhere holds no checkpoint"):
        generate.run(GenerateConfig(checkpoint=nowhere))
    tokens, out = str(tmp_path / "ids.npy"), str(tmp_path / "no" / "out.npy")
    with pytest.raises(InputError, match="out=.*: there is no folder .*/no"):
        score.run(ScoreConfig(checkpoint=nowhere, tokens=tokens, out=out))
    with pytest.raises(InputError, match="tokens=.*ids.npy cannot be read: .* No such file"):
        score.run(ScoreConfig(checkpoint=nowhere, tokens=tokens, out=str(tmp_path / "out.npy")))
    assert list(tmp_path.iterdir()) == []


def test_programs_without_their_keys_name_them() -> None:
    ended = run("score")
    assert ended.returncode == EXIT_USAGE
    assert ended.stderr.splitlines() == [
        "error: checkpoint.load is missing: give checkpoint.load=FOLDER of a run",
        "error: tokens=null: give tokens=FILE.npy or tokens=FILE.jsonl",
        "error: out=null: give out=FILE.npy",
    ]
