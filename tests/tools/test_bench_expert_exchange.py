"""The measurement of the experts' exchange counts the same bytes however it is divided."""

from __future__ import annotations

from collections.abc import Callable

from megatron_m1.model.config import ModelConfig
from parallel.layout import Layout
from tests.distributed import Pool

WIDTH, TOKENS = 16, 24


def bytes_sent() -> list[int]:
    from tools.bench_expert_exchange import measure

    layout = Layout(ep=2)
    layout.build_groups()
    model = ModelConfig(hidden_size=WIDTH, ffn_hidden_size=8, num_experts=4, num_layers=1)
    return [found.bytes_sent for found in measure(layout, model, TOKENS, [1, 3], steps=1)]


def test_parts_send_the_same_bytes(ranks: Callable[[int], Pool]) -> None:
    results = ranks(2).run(bytes_sent)
    for whole, divided in results:
        assert whole == divided
    # FP32 rows go to their experts and come back, and so do gradients; their probabilities and
    # the gradients of these travel once. What rank 0 sends out comes back from rank 1.
    per_assignment = 4 * (2 * WIDTH + 1)
    total = sum(whole for whole, _ in results)
    assert total % (2 * per_assignment) == 0
    assert 0 < total <= 2 * 2 * per_assignment * 2 * TOKENS
