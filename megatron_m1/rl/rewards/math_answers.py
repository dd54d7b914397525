"""Answers of mathematics, compared by math-verify (https://github.com/huggingface/Math-Verify).

Both answers go through its grammar of LaTeX only, which builds expressions of sympy from a parse
tree. Its other path, for plain expressions, hands text to Python's ``eval`` and is not used. What
sympy then does with an expression may take for ever, so this runs where it can be killed.
"""

from __future__ import annotations

import logging
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from megatron_m1.rl.rewards.answers import final_answer
from megatron_m1.rl.rewards.verdict import VerifierFailed

_LATEX = [LatexExtractionConfig()]

# It warns that somebody else must keep the time: the worker's parent does.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
) -> dict[str, float]:
    """1 where the final answer equals the ground truth, or one of several, else 0.

    ``format`` says whether there was a final answer, ``incomparable`` whether the two could not be
    compared.

    Raises:
        VerifierFailed: the ground truth is not understood.
    """
    truths = ground_truth if isinstance(ground_truth, list | tuple) else [ground_truth]
    if not truths:
        raise VerifierFailed("there is no ground truth")
    expected = [_understood(truth) for truth in truths]
    answer = final_answer(solution_str)
    if not answer:
        return {"score": 0.0, "format": 0.0}
    given = _parsed(answer)
    try:
        is_right = any(
            verify(one, given, timeout_seconds=None, raise_on_error=True) for one in expected
        )
    except Exception:
        return {"score": 0.0, "format": 1.0, "incomparable": 1.0}
    return {"score": float(is_right), "format": 1.0}


def _understood(truth: Any) -> list[Any]:
    text = "" if truth is None else str(truth)
    parsed = _parsed(final_answer(text) or text)
    if not parsed:
        raise VerifierFailed(f"the ground truth {text!r} is not understood")
    return parsed


def _parsed(answer: str) -> list[Any]:
    """What math-verify makes of an answer: an expression, where there is one, and the text."""
    return parse(f"${answer}$", _LATEX, parsing_timeout=None)  # type: ignore[no-any-return]
