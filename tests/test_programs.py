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
from megatron_m1.data.tokenizer import Tokenizer, train_bpe
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
    output: str

    @property
    def training(self) -> list[str]:
        return [
            "model=tiny",
            "model.num_layers=2",
            "model.layer_pattern=LS",
            "model.vocab_size=320",
            "data=indexed",
            f"data.train=[{self.data}/text]",
            f"data.tokenizer={self.data}",
            "train.steps=3",
            "train.seq_length=64",
            "train.micro_batch=2",
            "logger=quiet",
            f"run_dir={self.run}",
        ]


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
    ended = run("pretrain", *World(data, folder, "").training)
    assert ended.returncode == 0, ended.stderr
    return World(data, folder, ended.stdout)


@pytest.fixture(scope="module")
def generated(world: World) -> str:
    ended = run("generate", f"checkpoint.load={world.run}", f"prompt={PROMPT}", "max_new_tokens=20")
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


def error_of(ended: subprocess.CompletedProcess[str]) -> str:
    """The one sentence on standard error."""
    (line,) = ended.stderr.splitlines()
    return line


def test_pretrain_leaves_a_run(world: World) -> None:
    records = [json.loads(line) for line in (world.run / "metrics.jsonl").open()]
    assert [record["step"] for record in records if "train/loss" in record] == [1, 2, 3]
    assert "num_layers: 2" in (world.run / "config.yaml").read_text()
    assert (world.run / "report.png").stat().st_size > 10_000
    checkpoints = world.run / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_000003"]


def test_a_finished_run_says_so(world: World) -> None:
    ended = run("pretrain", *world.training)
    assert ended.returncode == 0
    assert "step_000003: going on from step 3" in ended.stdout
    assert "nothing is left to train: give more train.steps" in ended.stdout


def test_generate_streams_while_it_runs(world: World, generated: str) -> None:
    process = start(
        "generate", f"checkpoint.load={world.run}", f"prompt={PROMPT}", "max_new_tokens=20"
    )
    assert process.stdout is not None
    pieces = iter(lambda: os.read(process.stdout.fileno(), 1000).decode(), "")
    first = next(pieces)
    assert process.poll() is None
    assert generated.startswith(first) and len(first) < len(generated) / 2
    rest = list(pieces)
    process.communicate(timeout=60)
    assert len(rest) > 5
    assert first + "".join(rest) == generated


def test_generate_shows_the_prompt_and_its_continuation(world: World, generated: str) -> None:
    assert generated.startswith(PROMPT)
    assert len(Tokenizer.load(world.data).encode(generated.removesuffix("\n"))) > 10


def test_generate_over_two_processes_writes_the_same_text_once(
    world: World, generated: str
) -> None:
    ended = run(
        "generate",
        f"checkpoint.load={world.run}",
        f"prompt={PROMPT}",
        "max_new_tokens=20",
        "parallel.tp=2",
        torchrun=True,
    )
    assert (ended.returncode, ended.stdout) == (0, generated), ended.stderr


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


def test_a_checkpoint_of_another_model_is_refused(world: World, tmp_path: Path) -> None:
    arguments = [*world.training, "model.head_dim=16", f"run_dir={tmp_path}/new"]
    ended = run("pretrain", *arguments, f"checkpoint.load={world.run}")
    assert ended.returncode == EXIT_INPUT
    assert "model.head_dim=16 (the checkpoint has 32)" in error_of(ended)
    assert not (tmp_path / "new").exists()


def test_truncated_data_is_refused(world: World, tmp_path: Path) -> None:
    for kind in ("bin", "idx"):
        content = (world.data / f"text.{kind}").read_bytes()
        (tmp_path / f"text.{kind}").write_bytes(content[:-100] if kind == "bin" else content)
    arguments = [*world.training, f"data.train=[{tmp_path}/text]", f"run_dir={tmp_path}/new"]
    ended = run("pretrain", *arguments)
    assert ended.returncode == EXIT_INPUT
    assert f"{tmp_path}/text.bin" in error_of(ended) and "cut short" in error_of(ended)


def test_a_missing_tokenizer_is_refused(world: World, tmp_path: Path) -> None:
    ended = run("generate", f"checkpoint.load={world.run}", f"tokenizer={tmp_path}/none.json")
    assert ended.returncode == EXIT_INPUT
    assert f"tokenizer={tmp_path}/none.json" in error_of(ended)


def test_over_several_processes_one_prints_the_error() -> None:
    ended = run("pretrain", "parallel.tp=4", "optim.eps=0", torchrun=True)
    assert ended.returncode != 0
    said = [line for line in ended.stderr.splitlines() if line.startswith("error")]
    assert len(said) == len(set(said))
    assert any("2 processes cannot be divided by parallel.tp*cp*pp" in line for line in said)
    assert "error: optim.eps=0.0 must be positive" in said
    assert "Traceback" not in ended.stderr


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
