"""The command line, read strictly."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_m1 import config_loading
from megatron_m1.config import BatchPhase, GenerateConfig, LrPhase, RunConfig
from megatron_m1.config_loading import load
from megatron_m1.config_reading import read_section
from megatron_m1.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def loaded(*overrides: str) -> RunConfig:
    return load("pretrain", RunConfig, overrides)


def refused(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        loaded(*overrides)
    return error.value.problems


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("model.hiden=3", "unknown key model.hiden: did you mean model.hidden_size?"),
        ("train.step=3", "unknown key train.step: did you mean train.steps?"),
        ("tp=2", "unknown key tp: did you mean parallel.tp?"),
        ("optim.steps=2", "unknown key optim.steps: did you mean train.steps or "),
        ("+model.zzz=1", "unknown key +model.zzz: did you mean model?"),
        ("zzzzzz=1", "unknown key zzzzzz: the keys begin with model, parallel, optim, checkpoint"),
        ("rollout=native", "unknown key rollout: "),
        ("+train.steps=3", "+train.steps: the key exists already, write train.steps=3"),
        ("++train.steps=3", "++train.steps: the key exists already, write train.steps=3"),
        ("+model=tiny", "+model: the key exists already, write model=tiny"),
        ("~train.steps", "~train.steps: keys cannot be removed, write train.steps=VALUE"),
        ("train.steps", "train.steps is not of the form KEY=VALUE"),
    ],
)
def test_arguments_that_name_no_key(argument: str, problem: str) -> None:
    (found,) = refused(argument)
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("model=big", "model=big is not one of demo_rl, m1_100m, m1_1b,"),
        ("experiment=foo", "experiment=foo is not one of compare_rl, m1_100m,"),
        ("model={", "model={ cannot be read: no viable alternative at input '{'"),
        ("run_dir=${nowhere}", "Interpolation key 'nowhere' not found"),
    ],
)
def test_what_hydra_refuses_is_one_sentence(argument: str, problem: str) -> None:
    (found,) = refused(argument)
    assert found.startswith(problem) and "\n" not in found


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("7", 7),
        ("1e9", 10**9),
        ("4k", 4000),
        ("2B", 2 * 10**9),
        ("2.5m", 2_500_000),
        ("11.4T", 11_400 * 10**9),
        ("5.0", 5),
        ("123456789012345678901", 123456789012345678901),
        ("null", None),
    ],
)
def test_counts(text: str, count: int | None) -> None:
    assert loaded(f"train.tokens={text}").train.tokens == count


@pytest.mark.parametrize("text", ["abc", "2.5", "1e-3", "true", "4q", "[1]", "''"])
def test_what_is_no_count(text: str) -> None:
    (problem,) = refused(f"train.steps={text}")
    assert problem.startswith("train.steps=") and "is not a whole number" in problem


def test_values_of_the_wrong_type_are_reported_together() -> None:
    assert sorted(refused("optim.lr=x", "logger.console=7", "optim.betas=0.9", "seed=null")) == [
        "logger.console=7 is neither true nor false",
        "optim.betas=0.9 is not a list: write optim.betas=[0.9]",
        "optim.lr=x is not a finite number",
        "seed=null is not a whole number: 1000, 1e3, 4k and 2B are",
    ]


def test_lists_of_sections() -> None:
    config = loaded(
        "optim.phases=[{tokens: 1e9, lr: 1e-4}, {tokens: 4k, lr: 1, end_lr: 0, shape: linear}]",
        "train.batch_phases=[{from_tokens: 1B, global_batch: 16}]",
    )
    assert config.optim.phases == [LrPhase(10**9, 1e-4), LrPhase(4000, 1.0, 0.0, "linear")]
    assert config.train.batch_phases == [BatchPhase(10**9, 16)]


def test_an_element_of_a_list() -> None:
    config = loaded("optim=text01", "optim.phases.1.lr=5e-5", "optim.phases.0.tokens=7T")
    assert (config.optim.phases[1].lr, config.optim.phases[0].tokens) == (5e-5, 7 * 10**12)


def test_an_unknown_key_within_a_list() -> None:
    (problem,) = refused("optim.phases=[{tokens: 1, lrr: 2}]")
    assert problem == ("unknown key optim.phases[0].lrr in the configuration: did you mean lr?")


def assert_plain(value: Any) -> None:
    if is_dataclass(value):
        for entry in fields(value):
            assert_plain(getattr(value, entry.name))
    elif type(value) is list:
        for item in value:
            assert_plain(item)
    else:
        assert type(value) in (int, float, bool, str, type(None)), type(value)


def test_the_program_sees_nothing_of_hydra() -> None:
    assert_plain(loaded("experiment=text01_456b", "data.train=[a,b]", "data.weights=[1,2.5]"))


@pytest.mark.parametrize(
    "text",
    [
        "def f(x, y=[1]): ",
        "it's {a: b}",
        '"quoted',
        r"a\b \' \\",
        "ends in \\",
        "a=b, c",
        "1e3",
        "",
        "two\nlines",
    ],
)
def test_text_needs_no_quotes(text: str) -> None:
    assert load("generate", GenerateConfig, [f"prompt={text}"]).prompt == text


@pytest.mark.parametrize(("text", "value"), [("'a b'", "a b"), ('"a, b"', "a, b")])
def test_text_may_be_quoted(text: str, value: str) -> None:
    assert load("generate", GenerateConfig, [f"prompt={text}"]).prompt == value


def test_interpolation() -> None:
    assert loaded("optim.lr=0.5", "run_dir=runs/lr_${optim.lr}").run_dir == "runs/lr_0.5"


@dataclass
class Inner:
    count: int = 1


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    inners: list[Inner] = field(default_factory=list)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"inner": {"count": "???"}}, "inner.count is missing: give inner.count=..."),
        ({"inner": 3}, "inner=3 must hold the keys count"),
        ({"inner": {"cout": 3}}, "unknown key inner.cout in the configuration: did you mean coun"),
        ({"inners": [{"count": 1}, {"count": "x"}]}, "inners[1].count=x is not a whole number"),
    ],
)
def test_values_of_files(values: dict[str, Any], problem: str) -> None:
    problems: list[str] = []
    read_section(Outer, values, "", problems)
    assert len(problems) == 1 and problems[0].startswith(problem)


def test_counts_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = tmp_path / "conf"
    conf.mkdir()
    (conf / "pretrain.yaml").write_text(
        "defaults: [pretrain_schema, _self_]\ntrain: {steps: 1e3, global_batch: 2k}\n"
    )
    monkeypatch.setattr(config_loading, "CONF", conf)
    assert (loaded().train.steps, loaded().train.global_batch) == (1000, 2000)


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_m1.pretrain", *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_errors_are_sentences_without_a_traceback() -> None:
    ended = program("model.hiden=3", "parallel.tpp=2")
    assert (ended.returncode, ended.stdout) == (64, "")
    assert ended.stderr.splitlines() == [
        "error: unknown key model.hiden: did you mean model.hidden_size?",
        "error: unknown key parallel.tpp: did you mean parallel.tp?",
    ]


def test_all_conflicts_are_reported_together() -> None:
    ended = program("model=m1_1b", "parallel.tp=3", "optim.betas=[2,0]", "train.precision=fp8")
    assert ended.returncode == 64
    assert "Traceback" not in ended.stderr
    for part in (
        "parallel.tp*cp*pp = 3*1*1 = 3",
        "model.num_attention_heads=16 is not divisible by parallel.tp=3",
        "model.num_query_groups=4 is not divisible by parallel.tp=3",
        "model.vocab_size=65536 is not divisible by parallel.tp=3",
        "optim.betas=[2.0, 0.0] must be two numbers in [0, 1)",
        "train.precision=fp8 is not one of fp32, bf16",
    ):
        assert part in ended.stderr


def test_other_processes_leave_the_words_to_the_first() -> None:
    with pytest.raises(subprocess.TimeoutExpired) as waiting:
        subprocess.run(
            [sys.executable, "-m", "megatron_m1.pretrain", "nonsense=1"],
            cwd=ROOT,
            env={"RANK": "3", "WORLD_SIZE": "4"},
            capture_output=True,
            timeout=2,
        )
    assert not waiting.value.stderr


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--cfg", "job", "train.steps=7"], "steps: 7"),
        (["--help"], "m1_456b"),
        (["-m", "dry_run=true", "train.steps=5,6"], "6 steps, 24,576 tokens"),
    ],
)
def test_flags_of_hydra(arguments: Sequence[str], shown: str, tmp_path: Path) -> None:
    ended = program(
        *arguments, *(["hydra.sweep.dir=" + str(tmp_path)] if "-m" in arguments else [])
    )
    assert ended.returncode == 0, ended.stderr
    assert shown in ended.stdout


def test_flags_do_not_open_a_way_around_the_checks(tmp_path: Path) -> None:
    for argument in ("+train.zzz=1", "~train.steps", "train.zzz=1"):
        ended = program("--cfg", "job", argument)
        assert (ended.returncode, ended.stdout) == (64, "")
    ended = program("-m", "dry_run=true", "optim.eps=-1", f"hydra.sweep.dir={tmp_path}")
    assert (ended.returncode, "Traceback" in ended.stderr) == (64, False)
    assert "optim.eps=-1.0 must be positive" in ended.stderr


def test_a_dry_run_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv[1:] = ['dry_run=true', 'experiment=text01_456b'];"
        "from megatron_m1.pretrain import RunConfig, main, run; main('pretrain', RunConfig, run);"
        "assert 'torch' not in sys.modules"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
