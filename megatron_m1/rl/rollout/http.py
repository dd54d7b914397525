"""Rollout by OpenAI-compatible servers that have a copy of the policy's weights.

Each policy version is published under a name of its own, every answer says which weights it is of,
and one of other weights is not taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed as dist

from megatron_m1.checkpoint import agreement
from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.rl.rollout.asking import Asking
from megatron_m1.rl.rollout.client import Client, Counts
from megatron_m1.rl.rollout.config import HttpConfig
from megatron_m1.rl.rollout.engine import Request
from megatron_m1.rl.rollout.servers import Published, loading
from megatron_m1.rl.samples import Response

Publish = Callable[[int], Published]
"""Puts the weights of a policy version where servers can read them. Collective."""

# The other processes wait in a collective for no longer than this.
_HEARTBEAT = 20.0


class HttpEngine:
    """Asks servers, from the first process; all others are told. A ``RemoteEngine`` too.

    Attributes:
        version: policy version that the servers have, or will have before they are asked.
        counts: those of ``Asking``, and of ``retries``; of the first process.
    """

    def __init__(
        self, config: HttpConfig, tokenizer: Tokenizer, publish: Publish, version: int = 0
    ) -> None:
        self._config, self._tokenizer, self._publish = config, tokenizer, publish
        self._weights: Published | None = None
        self._asking: Asking | None = None
        self._is_stopped = False
        self.version = version
        self.counts = Counts()

    def generate(
        self, requests: Sequence[Request], *, stop_after: int | None = None
    ) -> Iterator[Response]:
        """See ``Engine``. A server keeps no state of what is paused, and tells no part of it."""
        self.open()
        asking = agreement.everywhere(
            lambda: self._ask(requests, stop_after) if dist.get_rank() == 0 else None
        )
        try:
            # Only the first process evaluates it.
            while (
                some := agreement.on_first(lambda: asking.take(_HEARTBEAT) if asking else None)
            ) is not None:
                yield from some
        finally:
            if asking:
                asking.close()

    def open(self) -> None:
        """Give servers the weights, where they have none of this run. Collective."""
        if not self._weights:
            self._give()

    def responses(self, requests: Sequence[Request]) -> Iterator[Response]:
        """See ``RemoteEngine``."""
        self._asking = self._ask(requests)
        if self._is_stopped:
            self._asking.stop()
        return self._asking.every()

    def stop(self) -> None:
        """See ``RemoteEngine``."""
        self._is_stopped = True
        if self._asking:
            self._asking.stop()

    def weights_changed(self, version: int) -> None:
        """Servers that are in use get the new weights at once, others with the first request."""
        self.version = version
        if self._weights:
            self._give()

    def _ask(self, requests: Sequence[Request], stop_after: int | None = None) -> Asking:
        return Asking(
            self._config, self._tokenizer, self._current, self.counts, requests, stop_after
        )

    def _current(self) -> Published:
        assert self._weights, "open() comes first"
        return self._weights

    def _give(self) -> None:
        weights = self._publish(self.version)
        told = loading(self._config.server, weights)
        if told:
            agreement.on_first_at_length(lambda: self._tell(*told), _HEARTBEAT)
        self._weights = weights

    def _tell(self, path: str, content: dict[str, Any]) -> None:
        with Client(self._config, self.counts) as client:
            client.post_to_each(path, content)
