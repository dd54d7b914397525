"""The engine of servers as a thread uses it while all processes train."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from megatron_m1.rl.rollout.engine import RemoteEngine
from megatron_m1.rl.samples import Response
from parallel.layout import Layout
from tests.rl.rollout.answers import REQUEST, answer, engine
from tests.rl.rollout.scripted import server

REQUESTS = [replace(REQUEST, index=index) for index in range(12)]
PATIENCE = 20.0


@pytest.fixture(autouse=True)
def _groups(single_process: Layout) -> None:
    """Weights are given by all processes, also where there is one."""


class Held:
    """Two requests at a time, which get no answer before the gate opens."""

    def __init__(self) -> None:
        self.gate, self.arrived = threading.Event(), threading.Semaphore(0)

    def __call__(self, number: int, body: dict[str, Any]) -> tuple[int, Any]:
        self.arrived.release()
        assert self.gate.wait(PATIENCE)
        return 200, answer(body["model"], [20])

    def wait_for(self, requests: int) -> None:
        for _ in range(requests):
            assert self.arrived.acquire(timeout=PATIENCE)


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_what_is_begun_after_an_update_is_of_its_weights(thread: ThreadPoolExecutor) -> None:
    held = Held()
    with server(held) as asked:
        source = engine(asked.url, concurrency=2)
        assert isinstance(source, RemoteEngine)
        source.open()
        found = thread.submit(lambda: list(source.responses(REQUESTS)))
        held.wait_for(2)
        source.weights_changed(1)
        held.gate.set()
        versions = sorted(response.versions[0] for response in found.result(PATIENCE))
    assert versions == [0, 0] + [1] * 10
    models = [body["model"] for body in asked.bodies]
    assert models == ["policy-0"] * 2 + ["policy-1"] * 10


def test_a_stop_waits_for_what_is_under_way(thread: ThreadPoolExecutor) -> None:
    held = Held()
    with server(held) as asked:
        source = engine(asked.url, concurrency=2)
        source.open()
        found = thread.submit(lambda: list(source.responses(REQUESTS)))
        held.wait_for(2)
        source.stop()
        # Time enough for what was not sent to be given up, which a thread does once a second.
        threading.Timer(1.5, held.gate.set).start()
        responses: list[Response] = found.result(PATIENCE)
        assert len(responses) == len(asked.bodies) == 2
        assert all(response.finish != "paused" for response in responses)
        # What is asked for after the stop is not begun at all.
        assert thread.submit(lambda: list(source.responses(REQUESTS))).result(PATIENCE) == []
        assert len(asked.bodies) == 2
