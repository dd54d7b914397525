"""Operations and state of M1 and R1 against what the papers publish."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_m1.model.config import ModelConfig
from megatron_m1.planning import flops, paper
from megatron_m1.planning.answer import K, compared, twin
from megatron_m1.planning.deepseek import DeepSeek
from megatron_m1.planning.flops import Countable
from megatron_m1.planning.state import kv_elements, lightning_state_bytes, state_bytes

R1 = DeepSeek()


def test_sizes_of_m1(m1: ModelConfig) -> None:
    assert m1.num_params() == paper.PARAMETERS
    assert m1.active_params() == pytest.approx(45.94e9, abs=5e6)


def test_sizes_of_r1() -> None:
    """671B, of which 37B are active (arXiv 2412.19437, abstract); the head is among the latter."""
    assert R1.num_params() == pytest.approx(671e9, rel=1e-3)
    head = R1.vocab_size * R1.hidden_size
    assert R1.active_params() + head == pytest.approx(37e9, rel=0.02)
    assert sum(R1.forward_flops(0).values()) == 2 * (R1.active_params() + head)


def test_state_of_a_sequence(m1: ModelConfig) -> None:
    assert kv_elements(m1) == 20_480
    assert lightning_state_bytes(m1) == 280 * 2**20
    assert state_bytes(m1, K) == 280 * 2**20 + K * 40_960
    assert kv_elements(twin(m1)) == 8 * kv_elements(m1) and lightning_state_bytes(twin(m1)) == 0
    assert R1.state_bytes(1) == 61 * 576 * 2


def test_every_weight_of_a_product_costs_two(m1: ModelConfig) -> None:
    norms = sum(2 * m1.hidden_size for _ in m1.layer_kinds) + m1.hidden_size
    norms += m1.layer_kinds.count("L") * m1.num_attention_heads * m1.head_dim
    weights = m1.active_params() - norms + m1.vocab_size * m1.hidden_size
    states = m1.forward_flops(0)["lightning attention"]
    assert sum(m1.forward_flops(0).values()) == 2 * weights + states
    assert states == 70 * 64 * 4 * 128**2


@pytest.mark.parametrize("model", [ModelConfig(), R1], ids=["ours", "R1"])
def test_generation_and_prefill_are_sums_of_steps(model: Countable) -> None:
    steps = [flops.decode(model, prompt) for prompt in range(6, 16)]
    assert flops.generation(model, 10, prompt=5) == pytest.approx(
        sum(sum(step.values()) for step in steps)
    )
    whole = flops.prefill(model, 7)
    for piece, total in whole.items():
        tokens = [flops.decode(model, seen)[piece] for seen in range(1, 8)]
        assert total == pytest.approx(tokens[-1] if piece == "head" else sum(tokens))


def test_training_is_what_metrics_report(m1: ModelConfig) -> None:
    assert sum(flops.training(m1, 8192).values()) == m1.flops_per_token(8192)
    # Six a weight that is active, one in a hundred for attention, 2.6 % for the head.
    assert m1.flops_per_token(8192) == pytest.approx(6 * 45.94e9, rel=0.05)


def in_figure(model: Countable, tokens: int) -> float:
    share = paper.VALUE_SHARE_R1 if model is R1 else paper.VALUE_SHARE_M1
    return paper.as_in_figure(model, tokens, share)


def test_the_curves_of_the_papers_figure(m1: ModelConfig) -> None:
    """R1's within 3 %, and 1 % from 49K on. M1's within 10 %, and 5 % from 97K on: the figure has a
    tenth more for a token before attention, which the paper does not explain."""
    for tokens, drawn_m1, drawn_r1 in zip(
        paper.FIGURE_TOKENS[1:], paper.FIGURE_M1[1:], paper.FIGURE_R1[1:], strict=True
    ):
        near_m1, near_r1 = 0.05 if tokens >= 97 * K else 0.1, 0.01 if tokens >= 49 * K else 0.03
        assert in_figure(m1, tokens) == pytest.approx(drawn_m1 * 1e16, rel=near_m1)
        assert in_figure(R1, tokens) == pytest.approx(drawn_r1 * 1e16, rel=near_r1)


def test_a_quarter_of_r1_at_100k_and_less_than_half_at_64k(m1: ModelConfig) -> None:
    """The paper's words: approximately 25 % and less than 50 %. Its own curves are at 28.8 % and
    38.5 %; counted as they are, we are at 27.8 % and 36.6 %: within three points of a quarter."""
    assert in_figure(m1, 100 * K) / in_figure(R1, 100 * K) == pytest.approx(0.25, abs=0.03)
    assert in_figure(m1, 64 * K) / in_figure(R1, 64 * K) < 0.5


def test_the_other_ways_of_counting_lie_around_a_quarter(m1: ModelConfig) -> None:
    at_64k, at_100k = compared(m1, 64 * K), compared(m1, 100 * K)
    # Causal: scores and values with the tokens before only. The strictest for M1.
    assert at_64k.generation[0] / at_64k.generation[2] == pytest.approx(0.445, abs=0.005)
    assert at_100k.generation[0] / at_100k.generation[2] == pytest.approx(0.339, abs=0.005)
    # The last token alone.
    assert at_100k.decode[0] / at_100k.decode[2] == pytest.approx(0.219, abs=0.005)
    # R1 as servers run it.
    assert at_100k.generation[0] / at_100k.absorbed == pytest.approx(0.118, abs=0.005)


def test_absorbing_changes_attention_alone() -> None:
    absorbed = replace(R1, absorbed=True)
    assert absorbed.num_params() == R1.num_params()
    plain, latent = R1.forward_flops(100), absorbed.forward_flops(100)
    assert latent.pop("attention") / plain.pop("attention") == (512 + 64 + 512) / (192 + 128)
    assert latent == plain
