"""What the loop asks of whatever generates responses, and what it gets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from megatron_m1.inference.requests import SamplingParams
from megatron_m1.rl.samples import Response

__all__ = ["Engine", "RemoteEngine", "Request", "SamplingParams"]


@dataclass(frozen=True)
class Request:
    """One response that is wanted.

    Attributes:
        prompt_id, index: whose response it is, and which of its group.
        prompt: tokens that the policy reads.
        seed: of the run; draws depend on it, prompt_id, index and the position only.
        begun: a paused response that goes on. Its tokens are kept and computed again, but where the
            engine still has its state.
    """

    prompt_id: int
    index: int
    prompt: tuple[int, ...]
    seed: int
    sampling: SamplingParams
    begun: Response | None = None


class Engine(Protocol):
    """Generates responses from some version of the policy's weights."""

    @property
    def version(self) -> int:
        """Policy version of the weights that it samples from."""
        ...

    def generate(
        self, requests: Sequence[Request], *, stop_after: int | None = None
    ) -> Iterator[Response]:
        """Responses as they finish. Once ``stop_after`` of them have, the others are given as they
        stand, ``finish="paused"``, also those that have no token yet.

        Over several processes it is collective: all pass the same requests, take the iterator to
        its end, and see the same responses in the same order.
        """
        ...

    def weights_changed(self, version: int) -> None:
        """The policy's weights have become those of ``version``: what was computed with older ones
        is dropped."""
        ...


@runtime_checkable
class RemoteEngine(Engine, Protocol):
    """Generates in processes of its own, so that a thread of the first process can ask it while all
    processes train."""

    def open(self) -> None:
        """Give it the weights, before ``responses`` is first asked for any. Collective."""
        ...

    def responses(self, requests: Sequence[Request]) -> Iterator[Response]:
        """What ``generate`` gives, to the calling process alone: no call in it is collective. What
        is begun after ``weights_changed`` has returned is of the new weights, and all of a response
        that weights overtake is of those that it was begun with, or says otherwise."""
        ...

    def stop(self) -> None:
        """From any thread: begin no further response. ``responses`` gives those that are under way
        and ends."""
        ...
