"""Verifiers in users' files, in the styles of other trainers."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from megatron_m1.errors import InputError
from megatron_m1.rl.rewards.config import VerifierConfig
from megatron_m1.rl.rewards.functions import load_function
from megatron_m1.rl.rewards.verdict import call

REQUEST = {
    "data_source": "mine",
    "solution_str": "four",
    "ground_truth": "4",
    "extra_info": {"prompt": "2+2", "completion_ids": [7, 8], "level": 3},
}


def score_of(folder: Path, source: str, style: str = "verl", name: str = "compute_score") -> float:
    file = folder / f"{style}.py"
    file.write_text(source)
    config = VerifierConfig("mine", file=str(file), function=name, style=style)
    return call(load_function(config), REQUEST).score


def test_verl(tmp_path: Path) -> None:
    source = """
def reward(data_source, solution_str, ground_truth, extra_info=None):
    assert (data_source, solution_str, ground_truth) == ("mine", "four", "4")
    return extra_info["level"]
"""
    assert score_of(tmp_path, source, name="reward") == 3.0


@pytest.mark.parametrize("prefix", ["", "async "])
def test_trl(tmp_path: Path, prefix: str) -> None:
    source = f"""
{prefix}def compute_score(prompts, completions, completion_ids, answer, level, **kwargs):
    assert (prompts, completions, completion_ids) == (["2+2"], ["four"], [[7, 8]])
    return [float(a) + n for a, n in zip(answer, level)]
"""
    assert score_of(tmp_path, source, "trl") == 7.0


def test_trl_that_does_not_apply(tmp_path: Path) -> None:
    source = "def compute_score(prompts, completions, **columns): return [None]"
    with pytest.raises(Exception, match="is not a finite number"):
        score_of(tmp_path, source, "trl")


def test_areal(tmp_path: Path) -> None:
    source = """
def compute_score(prompt, completions, prompt_ids, completion_ids, answer, **kwargs):
    assert (prompt, completions, completion_ids, kwargs) == ("2+2", "four", [7, 8], {"level": 3})
    return float(answer)
"""
    assert score_of(tmp_path, source, "areal") == 4.0


def test_the_signature_of_verl_is_kept(tmp_path: Path) -> None:
    (tmp_path / "trl.py").write_text("def compute_score(prompts, completions, **columns): pass")
    adapted: Any = load_function(VerifierConfig("x", file=str(tmp_path / "trl.py"), style="trl"))
    assert list(inspect.signature(adapted).parameters) == [
        *("data_source", "solution_str", "ground_truth", "extra_info")
    ]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, "does not exist"),
        ("x = 1", "has no function compute_score"),
        ("compute_score = 1", "has no function compute_score"),
        ("import no_such_module", "cannot be loaded: ModuleNotFoundError"),
    ],
)
def test_a_file_without_the_function(tmp_path: Path, source: str | None, said: str) -> None:
    file = tmp_path / "own.py"
    if source is not None:
        file.write_text(source)
    with pytest.raises(InputError, match=said):
        load_function(VerifierConfig("mine", file=str(file)))


def test_two_files_of_the_same_name(tmp_path: Path) -> None:
    found = []
    for number in (1, 2):
        file = tmp_path / str(number) / "own.py"
        file.parent.mkdir()
        file.write_text(f"def compute_score(*args, **kwargs): return {number}")
        found.append(call(load_function(VerifierConfig("x", file=str(file))), REQUEST).score)
    assert found == [1.0, 2.0]
