"""Which weights servers are given, when, and whose answers are taken."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from megatron_m1.rl.rollout.client import ServerError
from megatron_m1.rl.rollout.engine import RemoteEngine
from megatron_m1.rl.samples import Response
from parallel.layout import Layout
from tests.rl.rollout.answers import REQUEST, answer, drawn, engine
from tests.rl.rollout.scripted import Answer, server


@pytest.fixture(autouse=True)
def _groups(single_process: Layout) -> None:
    """Answers are shared with all processes, also where there is one."""


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"server": "megatron_m1"},
            ("/load_weights", {"folder": "folder-0", "name": "policy-0", "version": 0}),
        ),
        (
            {"server": "vllm", "model": "m"},
            (
                "/collective_rpc",
                {"method": "reload_weights", "kwargs": {"weights_path": "folder-0"}},
            ),
        ),
        (
            {"server": "sglang", "model": "m"},
            (
                "/update_weights_from_disk",
                {"model_path": "folder-0", "weight_version": "policy-0"},
            ),
        ),
    ],
    ids=["megatron_m1", "vllm", "sglang"],
)
def test_every_server_is_told_of_the_weights_before_it_is_asked(
    options: dict[str, Any], told: tuple[str, Any]
) -> None:
    said = "m" if options["server"] == "vllm" else "policy-0"

    def script(number: int, body: dict[str, Any]) -> Answer:
        assert first.told and second.told
        return 200, answer(said, [5])

    with server(script) as first, server(script) as second:
        found = list(engine(first.url, second.url, **options).generate([REQUEST] * 4))
    assert first.told == second.told == [told]
    assert len(found) == 4 and len(first.bodies) == len(second.bodies) == 2


def test_a_server_that_does_not_take_the_weights() -> None:
    with (
        server(lambda n, body: (200, {}), lambda n, body: (400, "other model")) as served,
        pytest.raises(ServerError, match="/load_weights refuses a request, status 400: .*other mo"),
    ):
        list(engine(served.url).generate([REQUEST]))
    assert served.bodies == []


def test_answers_of_other_weights_are_not_taken() -> None:
    def late(number: int, body: dict[str, Any]) -> tuple[int, Any]:
        """The first answers after an update are still of the old weights."""
        return 200, answer("policy-0" if number < 3 else body["model"], [20])

    with server(late) as served:
        asking = engine(served.url)
        (old,) = asking.generate([REQUEST])
        asking.weights_changed(1)
        (new,) = asking.generate([REQUEST])
        assert (old.versions, new.versions, asking.version) == ([0], [1], 1)
        assert asking.counts.taken()["stale"] == 2
        assert [body["version"] for _, body in served.told] == [0, 1]
    with pytest.raises(ServerError, match="answers with the weights policy-9, not policy-0"):
        drawn(lambda n, body: (200, answer("policy-9", [20])))
    with pytest.raises(ServerError, match="answers with the weights policy-9, not policy-0"):
        drawn(lambda n, body: (200, answer("policy-9", [20])), server="sglang", model="policy-9")


def test_nobody_is_told_of_weights_before_the_first_request() -> None:
    """A run that goes on, or has nothing left to do, needs no server to say so."""
    with server(lambda n, body: (200, answer(body["model"], [20]))) as served:
        asking = engine(served.url)
        asking.weights_changed(7)
        assert served.told == []
        (found,) = asking.generate([REQUEST])
    assert [body["version"] for _, body in served.told] == [7] and found.versions == [7]


def test_new_weights_overtake_requests_from_a_thread() -> None:
    """What was begun before is of the old weights, what is begun after of the new ones."""
    begun, release = threading.Event(), threading.Event()

    def script(number: int, body: dict[str, Any]) -> Answer:
        if number == 0:
            begun.set()
            release.wait(5)
        return 200, answer(body["model"], [20])

    with server(script) as served:
        asking = engine(served.url, concurrency=1)
        assert isinstance(asking, RemoteEngine)
        asking.open()
        responses: Iterator[Response] = asking.responses([REQUEST, replace(REQUEST, index=2)])
        found: list[Response] = []
        thread = threading.Thread(target=lambda: found.extend(responses))
        thread.start()
        assert begun.wait(5)
        asking.weights_changed(1)
        release.set()
        thread.join(5)
    assert [(one.index, one.versions) for one in found] == [(1, [0]), (2, [1])]


def test_stopped_from_another_thread_it_gives_what_is_under_way() -> None:
    begun, release = threading.Event(), threading.Event()

    def script(number: int, body: dict[str, Any]) -> Answer:
        begun.set()
        release.wait(5)
        return 200, answer(body["model"], [20])

    with server(script) as served:
        asking = engine(served.url, concurrency=1)
        asking.open()
        requests = [replace(REQUEST, index=index) for index in range(4)]
        found: list[Response] = []
        thread = threading.Thread(target=lambda: found.extend(asking.responses(requests)))
        thread.start()
        assert begun.wait(5)
        asking.stop()
        # Until the thread looks up from waiting, which it does now and then.
        time.sleep(0.5)
        release.set()
        thread.join(5)
    assert [(one.index, one.finish) for one in found] == [(0, "length")]
    assert len(served.bodies) == 1
