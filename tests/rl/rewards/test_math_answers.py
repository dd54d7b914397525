"""Answers of mathematics."""

from __future__ import annotations

from typing import Any

import math_verify.parser
import pytest

from megatron_m1.rl.rewards.math_answers import compute_score
from megatron_m1.rl.rewards.verdict import VerifierFailed


@pytest.fixture(autouse=True)
def no_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """sympy's ``parse_expr``, the way to Python's ``eval``, is never taken."""

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("parse_expr was called")

    monkeypatch.setattr(math_verify.parser, "parse_expr", refused)


def boxed(answer: str) -> str:
    return f"so it is $\\boxed{{{answer}}}$."


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        ("1/2", "0.5"),
        (r"\frac12", "1/2"),
        ("0.5", r"\frac{1}{2}"),
        ("1,000", "1000"),
        ("12", "12.0"),
        (34, "34"),
        (2.5, "5/2"),
        (r"1\frac{1}{2}", r"\frac{3}{2}"),
        ("x^2+2x+1", "(x+1)^2"),
        (r"\sqrt{8}", r"2\sqrt{2}"),
        ("(1,2)", r"\left(1, 2\right)"),
        ("[1,2)", "[1, 2)"),
        (r"\{1,2\}", r"\{2,1\}"),
        ("3", "x=3"),
        (r"\$5", "5"),
        ("5", r"5\text{ cm}"),
        (r"\text{yes}", r"\text{yes}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"\infty", r"\infty"),
        (r"\boxed{7}", "7"),
        ("2 + 5 = 7\n#### 7", "7"),
        (["6", "7"], "7"),
    ],
)
def test_equal(truth: Any, answer: str) -> None:
    assert compute_score("math", boxed(answer), truth) == {"score": 1.0, "format": 1.0}


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        ("1/2", "0.49"),
        ("2", "3"),
        ("-7", "7"),
        ("x^2+1", "(x+1)^2"),
        ("[1,2)", "(1,2)"),
        ("3", "3,4"),
        ("10000000000000000000001", "10000000000000000000000"),
        ("2", "2+"),
        ("3", "__import__('os').system('exit 1')"),
        (["6", "7"], "8"),
    ],
)
def test_different(truth: Any, answer: str) -> None:
    assert compute_score("math", boxed(answer), truth)["score"] == 0.0


@pytest.mark.parametrize("response", ["it is 7", "", r"\boxed{}", r"\boxed{7}</think> as I said"])
def test_no_answer(response: str) -> None:
    assert compute_score("math", response, "7") == {"score": 0.0, "format": 0.0}


@pytest.mark.parametrize("truth", ["", None, [], ["7", None]])
def test_a_truth_that_cannot_be_compared_with(truth: Any) -> None:
    with pytest.raises(VerifierFailed, match="is not understood|there is no ground truth"):
        compute_score("math", boxed("7"), truth)
