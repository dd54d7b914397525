"""Rollout by the training model itself: one copy of the weights, one set of kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.inference import requests as wanted
from megatron_m1.inference.generation import Generator
from megatron_m1.rl.rollout.engine import Request
from megatron_m1.rl.samples import Response


class NativeEngine:
    """Generates with the chunks that are trained, on the processes that train them.

    Args:
        slots: responses at a time on each data-parallel rank.
        record_experts: give responses the experts of their tokens, for routing replay.
    """

    def __init__(
        self,
        chunks: list[nn.Module],
        tokenizer: Tokenizer,
        *,
        slots: int = 16,
        prefill_tokens: int = 2048,
        record_experts: bool = False,
        version: int = 0,
    ) -> None:
        self._generator = Generator(
            chunks,
            slots=slots,
            prefill_tokens=prefill_tokens,
            stop_token=tokenizer.eod,
            tokenizer=tokenizer,
            record_experts=record_experts,
        )
        self._generator.version = version

    @property
    def version(self) -> int:
        return self._generator.version

    def generate(
        self, requests: Sequence[Request], *, stop_after: int | None = None
    ) -> Iterator[Response]:
        """See ``Engine``. The chunks are left in evaluation mode."""
        sequences = [_sequence(request) for request in requests]
        for number, continuation in self._generator.run(sequences, stop_after):
            request = requests[number]
            yield Response(request.prompt_id, request.index, **vars(continuation))

    def weights_changed(self, version: int) -> None:
        self._generator.weights_changed(version)


def _sequence(request: Request) -> wanted.Sequence:
    begun = None
    if request.begun is not None:
        fields = wanted.Continuation.__dataclass_fields__
        begun = wanted.Continuation(**{name: getattr(request.begun, name) for name in fields})
    return wanted.Sequence(
        request.prompt, request.sampling, request.seed, request.prompt_id, request.index, begun
    )
