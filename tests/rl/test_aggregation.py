from __future__ import annotations

import pytest
import torch

from megatron_m1.rl.aggregation import AGGREGATIONS, response_weights, token_weights

# Two prompts: responses of 1 and 3 tokens, and one of 4 with a neighbour that is left out.
LENGTHS = torch.tensor([1, 4, 3, 0])
PROMPTS = torch.tensor([7, 2, 7, 2])


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("prompt_mean", [1 / 8, 1 / 8, 1 / 8, 0]),
        ("token_mean", [1 / 8, 1 / 8, 1 / 8, 0]),
        ("sequence_mean", [1 / 3, 1 / 12, 1 / 9, 0]),
    ],
)
def test_weights_of_tokens(aggregation, expected):
    weights = response_weights(LENGTHS, PROMPTS, aggregation)
    assert torch.allclose(weights, torch.tensor(expected, dtype=torch.float64), atol=1e-15)


def test_a_prompt_weighs_the_same_whatever_its_length():
    lengths, prompts = torch.tensor([1, 1, 10, 28]), torch.tensor([0, 0, 1, 1])
    weights = response_weights(lengths, prompts, "prompt_mean")
    assert weights.tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 76, 1 / 76])
    assert response_weights(lengths, prompts, "token_mean").tolist() == [1 / 40] * 4


def test_a_prompt_without_live_tokens_is_no_prompt_of_the_mean():
    lengths, prompts = torch.tensor([2, 0, 0]), torch.tensor([0, 1, 1])
    assert response_weights(lengths, prompts).tolist() == [1 / 2, 0, 0]
    assert response_weights(lengths, None, "sequence_mean").tolist() == [1 / 2, 0, 0]


def test_without_prompts_all_responses_are_of_one():
    assert torch.equal(
        response_weights(LENGTHS), response_weights(LENGTHS, torch.full((4,), 9), "prompt_mean")
    )


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_add_up_to_one(aggregation, share):
    weights = response_weights(LENGTHS, PROMPTS, aggregation, share)
    assert float((weights * LENGTHS).sum()) == pytest.approx(1, abs=1e-15)
    by_sequence = response_weights(LENGTHS, PROMPTS, "sequence_mean")
    alone = response_weights(LENGTHS, PROMPTS, aggregation)
    assert torch.allclose(weights, share * by_sequence + (1 - share) * alone, atol=1e-15)


def test_nothing_live_has_no_weight():
    for aggregation in AGGREGATIONS:
        weights = response_weights(torch.zeros(3, dtype=torch.int64), None, aggregation)
        assert weights.tolist() == [0, 0, 0]


def test_tokens_get_the_weight_of_their_response_where_they_are_live():
    mask = torch.tensor([[0, 1, 0], [1, 1, 1]])
    weights = token_weights(mask, torch.tensor([0, 1]), "sequence_mean")
    assert weights.tolist() == [[0, 1 / 2, 0], [1 / 6, 1 / 6, 1 / 6]]
    assert torch.equal(weights, token_weights(mask.bool(), torch.tensor([0, 1]), "sequence_mean"))


def test_what_is_refused():
    with pytest.raises(ValueError, match="aggregation is 'mean'; give prompt_mean, token_mean"):
        response_weights(LENGTHS, PROMPTS, "mean")
    with pytest.raises(ValueError, match="sequence_share is 1.5"):
        response_weights(LENGTHS, PROMPTS, sequence_share=1.5)
    with pytest.raises(ValueError, match=r"prompt_index must be \[4\].*got \[3\]"):
        response_weights(LENGTHS, PROMPTS[:3])
