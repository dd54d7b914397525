"""One model for many callers: continuous batching over what arrives, in any layout.

The threads of callers leave orders; the main threads of all processes take them up together between
two steps of generation, and the first process gives the answers back.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_m1.checkpoint import store
from megatron_m1.checkpoint.beside import TOKENIZER
from megatron_m1.checkpoint.choosing import chosen
from megatron_m1.checkpoint.models import model_differences, saved_model
from megatron_m1.config import ServeConfig
from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.errors import InputError, UserError
from megatron_m1.inference.generation import Generation, Generator
from megatron_m1.inference.load import Loaded, load_tokenizer
from megatron_m1.inference.requests import Continuation, Sequence
from megatron_m1.serving.protocol import Asked, Limits, Weights

# How long a process without work waits before it looks for a signal.
_IDLE = 0.5


class NotServed(Exception):
    """The weights that were asked for are not those that are loaded."""


class Unavailable(Exception):
    """There are no weights to answer with, or the server ends."""


@dataclass(frozen=True)
class Answer:
    """A response and the weights that it is of."""

    continuation: Continuation
    weights: Weights


@dataclass(frozen=True)
class _Ask:
    ticket: int
    sequence: Sequence
    model: str | None


@dataclass(frozen=True)
class _Drop:
    ticket: int


@dataclass(frozen=True)
class _Load:
    ticket: int
    folder: str
    weights: Weights


_Order = _Ask | _Drop | _Load


class Service:
    """Answers until ``stop`` is set.

    Attributes:
        weights: that answers are given of; None where loading some has failed halfway.
        limits: of what can be asked for.
    """

    def __init__(
        self, config: ServeConfig, loaded: Loaded, tokenizer: Tokenizer, stop: threading.Event
    ) -> None:
        self._config, self._loaded, self._tokenizer = config, loaded, tokenizer
        self._stop = stop
        self._orders: deque[_Order] = deque()
        self._arrived = threading.Condition()
        self._futures: dict[int, Future[Any]] = {}
        self._is_over = False
        self._tickets = itertools.count(1)
        self._numbers: dict[int, int] = {}  # from tickets to those of the generation
        self.weights: Weights | None = Weights(config.server.name or str(loaded.path), 0)
        self._generation = self._begin(0)

    @property
    def limits(self) -> Limits:
        places = self._config.server.max_length
        return Limits(self._tokenizer, self._loaded.model.vocab_size, places)

    def ask(self, asked: Asked) -> tuple[int, Future[Answer]]:
        """From any thread of the first process: a ticket, and what will be the answer or
        ``NotServed`` or ``Unavailable``."""
        return self._order(lambda ticket: _Ask(ticket, asked.sequence, asked.model))

    def load(self, folder: str, weights: Weights) -> Future[Weights]:
        """From any thread of the first process: take other weights of the same model, once all is
        answered that was asked for before. ``InputError`` where they cannot be."""
        return self._order(lambda ticket: _Load(ticket, folder, weights))[1]

    def drop(self, ticket: int) -> None:
        """From any thread of the first process: nobody waits for this answer."""
        with self._arrived:
            self._futures.pop(ticket, None)
            waiting = [order for order in self._orders if order.ticket != ticket]
            if len(waiting) == len(self._orders):
                waiting.insert(0, _Drop(ticket))
            self._orders = deque(waiting)

    def run(self) -> None:
        """Work until the end. Collective."""
        try:
            while (orders := self._shared()) is not None:
                for order in orders:
                    self._do(order)
                for number, continuation in self._generation.step():
                    self._finish(number, continuation)
        finally:
            self._refuse_all()

    def _order(self, order: Callable[[int], _Order]) -> tuple[int, Future[Any]]:
        ticket, future = next(self._tickets), Future[Any]()
        with self._arrived:
            self._futures[ticket] = future
            if self._is_over:
                self._fail(ticket, Unavailable("the server ends"))
            self._orders.append(order(ticket))
            self._arrived.notify()
        return ticket, future

    def _shared(self) -> list[_Order] | None:
        """The same orders on every process; None at the end."""
        box = [self._taken() if dist.get_rank() == 0 else None]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def _taken(self) -> list[_Order] | None:
        """The orders that may be taken up now, in the order in which they came."""
        with self._arrived:
            if not self._orders and not self._generation.unfinished:
                self._arrived.wait(_IDLE)
            if self._stop.is_set():
                return None
            taken: list[_Order] = []
            while self._orders:
                order = self._orders[0]
                is_load = isinstance(order, _Load)
                if is_load and (taken or self._generation.unfinished):
                    break
                self._orders.popleft()
                if not isinstance(order, _Ask) or self._is_served(order):
                    taken.append(order)
                if is_load:
                    break
            return taken

    def _is_served(self, order: _Ask) -> bool:
        if self.weights is None:
            self._fail(order.ticket, Unavailable("the server has no whole weights: load others"))
        elif order.model not in (None, self.weights.name):
            message = f"model={order.model} is not served: {self.weights.name} is"
            self._fail(order.ticket, NotServed(message))
        else:
            return True
        return False

    def _do(self, order: _Order) -> None:
        if isinstance(order, _Ask):
            self._numbers[order.ticket] = self._generation.add(order.sequence)
        elif isinstance(order, _Drop):
            number = self._numbers.pop(order.ticket, None)
            if number is not None:
                self._generation.drop(number)
        else:
            self._load(order)

    def _finish(self, number: int, continuation: Continuation) -> None:
        ticket = next(t for t, known in self._numbers.items() if known == number)
        del self._numbers[ticket]
        future = self._futures.pop(ticket, None)
        if future:
            assert self.weights
            future.set_result(Answer(continuation, self.weights))

    def _load(self, order: _Load) -> None:
        try:
            with chosen(order.folder, None, self._config.checkpoint.verify) as path:
                assert path
                self._replace(path, order.weights)
        except UserError as error:
            self._fail(order.ticket, error)
            return
        future = self._futures.pop(order.ticket, None)
        if future:
            future.set_result(order.weights)

    def _replace(self, path: Path, weights: Weights) -> None:
        here, there = self._loaded.model, saved_model(path)
        differing = model_differences(here, there, also=["fp32_lm_head"])
        if differing:
            raise InputError(f"{path} is of another model: {', '.join(differing.values())}")
        found = Loaded(here, self._loaded.chunks, path)
        if self._config.tokenizer is None and (path / TOKENIZER).is_file():
            self._tokenizer = load_tokenizer(None, self._config.eod, found)
        # From here on the old weights are gone, whether the new ones come or not.
        self.weights = None
        store.load_weights(found.chunks, path)
        self._loaded = found
        # No state of the old weights is left: the slots are new ones.
        del self._generation
        self._generation = self._begin(weights.version)
        self.weights = weights

    def _begin(self, version: int) -> Generation:
        server = self._config.server
        generator = Generator(
            self._loaded.chunks,
            slots=server.slots,
            prefill_tokens=server.prefill_tokens,
            stop_token=self._tokenizer.eod,
            tokenizer=self._tokenizer,
        )
        generator.weights_changed(version)
        return Generation(generator, server.slots, server.max_length)

    def _fail(self, ticket: int, error: Exception) -> None:
        future = self._futures.pop(ticket, None)
        if future:
            future.set_exception(error)

    def _refuse_all(self) -> None:
        with self._arrived:
            self._is_over = True
            for ticket in list(self._futures):
                self._fail(ticket, Unavailable("the server ends"))
