"""The choice of tokens for a batch, and the uniform numbers that choose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_m1.inference import sampling
from megatron_m1.inference.draws import stream, uniforms
from megatron_m1.inference.requests import SamplingParams
from megatron_m1.inference.sampling import draw

LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
DRAWS = 4000


def drawn(logits: Tensor, temperature: float = 1, top_k: int = 0, top_p: float = 1) -> Tensor:
    """[DRAWS, 3], from uniform numbers at equal distances."""
    count = (DRAWS,)
    return draw(
        logits.expand(DRAWS, -1),
        (np.arange(DRAWS) + 0.5) / DRAWS,
        np.full(count, float(temperature)),
        np.full(count, top_k),
        np.full(count, float(top_p)),
    )


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 3}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.71}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 0.01}, [0, 1, 0, 0]),
        # Of the three that are left the first has 4/9, the first two 7/9.
        ({"top_k": 3, "top_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 2, "top_p": 0.99}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 0.5, "top_p": 0.8}, [0, 16 / 25, 0, 9 / 25]),
    ],
)
def test_shares_and_log_probabilities(options: dict[str, float], shares: list[float]) -> None:
    found = drawn(LOGITS, **options)
    tokens = found[:, 0].long()
    counted = torch.bincount(tokens, minlength=4) / DRAWS
    assert counted.tolist() == pytest.approx(shares, abs=1e-3)
    torch.testing.assert_close(found[:, 1].exp(), torch.tensor(shares)[tokens].double())
    torch.testing.assert_close(found[:, 2], LOGITS[tokens].double())


def test_each_sequence_has_its_own_way() -> None:
    ways = [(0.0, 0, 1.0), (1.0, 2, 1.0), (2.0, 0, 0.6), (1.0, 0, 1.0), (0.0, 3, 0.5)]
    logits = torch.randn(5, 50) * 3
    chances = np.array([0.3, 0.9, 0.5, 0.01, 0.7])
    columns = [np.array(column) for column in zip(*ways, strict=True)]
    together = draw(logits, chances, *columns)
    for row in range(5):
        one = slice(row, row + 1)
        alone = draw(logits[one], chances[one], *(column[one] for column in columns))
        torch.testing.assert_close(together[one], alone)


def test_more_tokens_than_are_sorted_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 200) * torch.tensor([[0.0], [1.0], [9.0]])
    arguments = (np.array([0.2, 0.5, 0.9]), np.ones(3), np.zeros(3, int), np.full(3, 0.9))
    whole = draw(logits, *arguments)
    monkeypatch.setattr(sampling, "LIKELY", 20)
    assert torch.equal(draw(logits, *arguments), whole)


def test_a_token_that_is_left_out_is_never_drawn() -> None:
    """At the ends of the interval too."""
    logits = torch.tensor([0.0, 5.0, 5.0, 0.0]).expand(2, -1)
    tokens = draw(logits, np.array([0.0, 1 - 2.0**-52]), np.ones(2), np.full(2, 2), np.ones(2))[
        :, 0
    ]
    assert tokens.tolist() == [1, 2]


def test_filters_that_let_all_in_change_nothing() -> None:
    logits = torch.randn(100)
    assert torch.equal(drawn(logits, top_k=100)[:, 0], drawn(logits)[:, 0])
    assert torch.equal(drawn(logits, top_p=1 - 1e-9)[:, 0], drawn(logits)[:, 0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_what_is_not_finite_is_nan(value: float, temperature: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = value
    ones = np.ones(2)
    found = draw(logits, ones / 2, ones * temperature, np.zeros(2, int), ones)
    assert found[0].isfinite().all() and found[1].isnan().all()


def test_uniform_numbers_are_uniform_and_apart() -> None:
    streams = np.array([stream(s, p, i) for s in (0, 1) for p in range(10) for i in range(10)])
    assert len(set(streams.tolist())) == 200
    numbers = np.stack(
        [uniforms(streams.astype(np.uint64), np.full(200, n)) for n in range(500)], axis=1
    )
    assert numbers.min() >= 0 and numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=20)
    # Chi-squared with 19 degrees of freedom is above 44 once in a thousand times.
    assert ((counts - 5000) ** 2 / 5000).sum() < 44
    for left, right in ((numbers[:, 1:], numbers[:, :-1]), (numbers[1:], numbers[:-1])):
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 0.01


def test_uniform_numbers_are_those_of_every_machine() -> None:
    """A run that goes on elsewhere, or with another NumPy, draws what it would have drawn."""
    found = uniforms(np.array([stream(1234, 56, 7)], np.uint64), np.array([8]))
    assert found.tolist() == [0.036152915654346085]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"temperature": -1}, "rollout.temperature=-1 must not be negative"),
        ({"top_p": 1.5}, "rollout.top_p=1.5 must be above 0 and at most 1"),
        ({"top_k": -1}, "rollout.top_k=-1 must not be negative: 0 samples from all"),
        ({"max_new_tokens": 0}, "rollout.max_new_tokens=0 must be at least 1"),
        ({"stop": ("a", "")}, "rollout.stop=['a', ''] holds an empty text, which ends nothing"),
        ({"repetition_length": -1}, "rollout.repetition_length=-1 must not be negative: 0 never"),
        ({"repetition_probability": 1}, "rollout.repetition_probability=1 must be between 0 and 1"),
    ],
)
def test_what_cannot_be_sampled_with(changes: dict, problem: str) -> None:
    (found,) = SamplingParams(**changes).problems("rollout")
    assert found.startswith(problem)
