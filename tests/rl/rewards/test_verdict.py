"""What verifiers may answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_m1.rl.rewards.verdict import Verdict, VerifierFailed, as_verdict, call

REQUEST = {"data_source": "x", "solution_str": "y", "ground_truth": "z", "extra_info": None}


@pytest.mark.parametrize("score", [1, 0.5, True, np.float32(0.5), torch.tensor(1.0)])
def test_numbers(score: Any) -> None:
    assert as_verdict(score) == Verdict(float(score))
    assert as_verdict({"score": score}) == Verdict(float(score))


def test_details_are_the_other_numbers() -> None:
    found = as_verdict({"score": 1, "acc": True, "pred": "42", "tests": 3, "why": None})
    assert found == Verdict(1.0, {"acc": 1.0, "tests": 3.0})


@pytest.mark.parametrize(
    "result", [None, "1.0", float("nan"), float("inf"), {}, {"score": None}, {"acc": 1}, [1.0, 2.0]]
)
def test_what_is_no_score(result: Any) -> None:
    with pytest.raises(VerifierFailed, match="is not a finite number"):
        as_verdict(result)


def test_functions_and_coroutine_functions() -> None:
    def plain(
        data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None
    ) -> Any:
        return {"score": solution_str == "y"}

    async def waiting(
        data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None
    ) -> Any:
        return plain(data_source, solution_str, ground_truth)

    assert call(plain, REQUEST) == call(waiting, REQUEST) == Verdict(1.0)
