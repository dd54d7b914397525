"""Generation with a BF16 body, against BF16 forward passes over whole texts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megatron_m1.inference.generation import Generator
from megatron_m1.inference.requests import Continuation, SamplingParams, Sequence
from megatron_m1.model.build import build_chunks, forward_row
from megatron_m1.model.transformer_config import transformer_config
from parallel.layout import Layout
from parallel.packing import PackedRow
from tests.training.small_run import MODEL

SEQUENCES = [
    Sequence(
        tuple(np.random.RandomState(length).randint(MODEL.vocab_size, size=length)),
        SamplingParams(temperature=0, max_new_tokens=20),
        prompt_id=length,
    )
    for length in (1, 23, 5, 40)
]
# Of logits of a few units BF16 keeps hundredths, and layers add to that.
LOGIT = 0.1


@pytest.fixture(scope="module", params=[True, False], ids=["fp32_head", "bf16_head"])
def chunk(request: pytest.FixtureRequest, single_process: Layout) -> nn.Module:
    model = replace(MODEL, fp32_lm_head=request.param)
    return build_chunks(model, transformer_config(model, Layout(), precision="bf16"), seed=1)[0]


def generated(
    chunk: nn.Module, stop_after: int | None = None
) -> tuple[list[Continuation], Generator]:
    generator = Generator([chunk], slots=2, prefill_tokens=7)
    found = dict(generator.run(SEQUENCES, stop_after))
    return [found[number] for number in range(len(SEQUENCES))], generator


@torch.no_grad()
def whole_text(chunk: nn.Module, sequence: Sequence, tokens: list[int]) -> Tensor:
    """[response, V] logits of one forward pass over prompt and response."""
    row = PackedRow.from_documents([torch.tensor([*sequence.prompt, *tokens])])
    logits = forward_row(chunk.eval(), row, with_loss=False)[0].float()
    return logits[len(sequence.prompt) - 1 : -1]


def test_the_most_likely_tokens_are_drawn(chunk: nn.Module) -> None:
    decided = 0
    for sequence, found in zip(SEQUENCES, generated(chunk)[0], strict=True):
        logits = whole_text(chunk, sequence, found.tokens)
        best = logits.topk(2).values
        tokens = torch.tensor(found.tokens)
        chosen = logits.gather(1, tokens[:, None])[:, 0]
        assert (best[:, 0] - chosen <= LOGIT).all()
        margin = best[:, 0] - best[:, 1] > LOGIT
        assert torch.equal(tokens[margin], logits.argmax(-1)[margin])
        decided += int(margin.sum())
        expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        np.testing.assert_allclose(found.raw_logprobs, expected, atol=LOGIT)
    assert decided > 40


def test_states_are_kept_in_fp32_and_keys_in_bf16(chunk: nn.Module) -> None:
    _, generator = generated(chunk, stop_after=1)
    assert generator.paused
    for paused in generator.paused.values():
        states = list(paused.saved.states.values())
        assert {state.dtype for state in states} == {torch.float32}
        assert all(state.isfinite().all() and state.abs().sum() > 0 for state in states)
        for layer in paused.saved.keys_values.values():
            assert layer.keys.dtype == layer.values.dtype == torch.bfloat16


def test_numbers_of_a_state_are_more_than_bf16_holds(chunk: nn.Module) -> None:
    """FP32 in more than name: sums are not rounded on their way into the state."""
    _, generator = generated(chunk, stop_after=1)
    (paused, *_) = generator.paused.values()
    for state in paused.saved.states.values():
        assert (state != state.bfloat16().float()).float().mean() > 0.5
