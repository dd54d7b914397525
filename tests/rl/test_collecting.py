"""Batches of judged groups: full, without groups that teach nothing, and the same after a kill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_m1.data.tokenizer import Tokenizer, train_bpe
from megatron_m1.rl.collecting import Batch, Collector
from megatron_m1.rl.config import RLConfig
from megatron_m1.rl.rollout.engine import Request
from megatron_m1.rl.samples import Prompt, Response, Scored
from parallel.layout import Layout
from tests.rl.drawing import DrawingEngine, Numbers, judge
from tests.rl.stored import rl_config

WINDOW = 30


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["0123456789"], 257)


def collector(
    folder: Path, tokenizer: Tokenizer, engine: DrawingEngine | None = None, **changes: Any
) -> Collector:
    draw = (engine or DrawingEngine()).generate
    config = replace(rl_config("unused"), **changes)
    return Collector(Numbers(), tokenizer, draw, judge, config, folder, "fingerprint")


def with_rollout(config: RLConfig, **changes: Any) -> dict[str, Any]:
    return {"rollout": replace(config.rollout, **changes)}


def with_rl(config: RLConfig, **changes: Any) -> dict[str, Any]:
    return {"rl": replace(config.rl, **changes)}


def shown(batch: Batch) -> list[Any]:
    """What a step trains on, as plain values."""
    return [[asdict(scored) for scored in group.scored] for group in batch.groups]


PAUSING = with_rollout(rl_config("unused"), tokens_per_step=8)


def test_a_batch_is_full_and_every_group_teaches(
    single_process: Layout, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    batch = collector(tmp_path, tokenizer).collect(0, WINDOW)
    assert len(batch.groups) == 4
    assert all(group.has_spread and group.prompt.id % 3 for group in batch.groups)
    assert batch.without_spread >= 2
    assert len(batch.judged) == 4 * (4 + batch.without_spread)
    assert batch.paused == 0
    assert batch.drawn == sum(len(scored.response.tokens) for _, scored in batch.judged)


def test_failed_judgements_give_no_spread(
    single_process: Layout, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    def failing(prompt: Prompt, response: Response) -> Future[Scored]:
        verdict: Future[Scored] = Future()
        found = judge(prompt, response).result()
        verdict.set_result(replace(found, failed=found.reward == 1))
        return verdict

    source = collector(tmp_path, tokenizer)
    source.judge = failing
    assert source.collect(0, WINDOW).groups == []


def test_without_dynamic_sampling_every_prompt_is_kept(
    single_process: Layout, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    config = with_rl(rl_config("unused"), dynamic_sampling=False)
    batch = collector(tmp_path, tokenizer, **config).collect(0, WINDOW)
    assert [group.prompt.id for group in batch.groups] == [0, 1, 2, 3]


def test_refills_are_bounded(single_process: Layout, tmp_path: Path, tokenizer: Tokenizer) -> None:
    engine = DrawingEngine()
    source = collector(tmp_path, tokenizer, engine, **with_rl(rl_config(""), refills=1))
    batch = source.collect(0, WINDOW)
    assert len(batch.groups) < 4
    assert {prompt for prompt, _ in engine.asked} == {0, 1, 2, 3}


def test_paused_responses_go_on_with_newer_weights(
    single_process: Layout, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    engine = DrawingEngine()
    source = collector(tmp_path, tokenizer, engine, **PAUSING)
    longest = Response(0, 0, [], [], [], [], "stop")
    for step in range(6):
        batch = source.collect(step, WINDOW)
        engine.weights_changed(step + 1)
        for _, scored in batch.judged:
            longest = max(longest, scored.response, key=lambda r: len(set(r.versions)))
    assert len(set(longest.versions)) >= 3
    assert longest.versions == sorted(longest.versions)
    assert max(longest.versions.count(version) for version in longest.versions) <= 8


def test_a_full_response_of_fewer_tokens_is_not_paused(
    single_process: Layout, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """As of a server that tells texts, which are encoded again."""

    class Shortening(DrawingEngine):
        def _respond(self, request: Request) -> Response:
            found = super()._respond(request)
            return replace(found, finish="length", tokens=found.tokens[: WINDOW - 1])

    batch = collector(tmp_path, tokenizer, Shortening()).collect(0, WINDOW)
    assert len(batch.groups) == 4 and batch.paused == 0


@pytest.mark.parametrize("changes", [{}, PAUSING], ids=["whole", "pausing"])
def test_a_collector_goes_on_from_its_state(
    single_process: Layout, tmp_path: Path, tokenizer: Tokenizer, changes: dict[str, Any]
) -> None:
    engine = DrawingEngine()
    unbroken = collector(tmp_path / "unbroken", tokenizer, engine, **changes)
    expected = [take_step(unbroken, engine, step) for step in range(6)]
    engine = DrawingEngine()
    first = collector(tmp_path / "broken", tokenizer, engine, **changes)
    found = [take_step(first, engine, step) for step in range(3)]
    second = collector(tmp_path / "broken", tokenizer, engine, **changes)
    second.load_state_dict(first.state_dict())
    assert found + [take_step(second, engine, step) for step in range(3, 6)] == expected


class Killed(Exception):
    pass


class DyingEngine(DrawingEngine):
    """Is killed after some responses."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def generate(
        self, requests: Sequence[Request], *, stop_after: int | None = None
    ) -> Iterator[Response]:
        for response in super().generate(requests):
            if self.after == 0:
                raise Killed
            self.after -= 1
            yield response


@pytest.mark.parametrize("after", [0, 1, 7, 16, 23])
@pytest.mark.parametrize("changes", [{}, PAUSING], ids=["whole", "pausing"])
def test_what_was_paid_for_is_not_drawn_again(
    single_process: Layout,
    tmp_path: Path,
    tokenizer: Tokenizer,
    changes: dict[str, Any],
    after: int,
) -> None:
    unbroken = DrawingEngine()
    source = collector(tmp_path / "unbroken", tokenizer, unbroken, **changes)
    expected = shown(source.collect(0, WINDOW))
    with pytest.raises(Killed):
        collector(tmp_path / "broken", tokenizer, DyingEngine(after), **changes).collect(0, WINDOW)
    resumed = DrawingEngine()
    again = collector(tmp_path / "broken", tokenizer, resumed, **changes)
    assert shown(again.collect(0, WINDOW)) == expected
    assert len(resumed.asked) == len(unbroken.asked) - after


def take_step(source: Collector, engine: DrawingEngine, step: int) -> list[Any]:
    result = shown(source.collect(step, WINDOW))
    engine.weights_changed(step + 1)
    return result


def test_what_was_judged_is_not_judged_again(
    single_process: Layout, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    def never(prompt: Prompt, response: Response) -> Future[Scored]:
        raise AssertionError((prompt.id, response.index))

    expected = shown(collector(tmp_path, tokenizer).collect(0, WINDOW))
    again = collector(tmp_path, tokenizer)
    again.judge = never
    assert shown(again.collect(0, WINDOW)) == expected


def test_responses_of_an_earlier_run_are_judged_side_by_side(
    single_process: Layout, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Verdicts that were not known when that run was killed, of all groups before one is waited
    for."""
    changes = with_rl(rl_config(""), refills=1)

    def dying(prompt: Prompt, response: Response) -> Future[Scored]:
        verdict: Future[Scored] = Future()
        verdict.set_exception(Killed())
        return verdict

    first = collector(tmp_path, tokenizer, **changes)
    first.judge = dying
    with pytest.raises(Killed):
        first.collect(0, WINDOW)
    second = collector(tmp_path, tokenizer, **changes)
    waiting: list[tuple[Prompt, Response, Future[Scored]]] = []

    def at_once(prompt: Prompt, response: Response) -> Future[Scored]:
        waiting.append((prompt, response, Future()))
        if len(waiting) == 16:
            for prompt, response, verdict in waiting:
                verdict.set_result(judge(prompt, response).result())
        return waiting[-1][2]

    second.judge = at_once
    assert len(second.collect(0, WINDOW).judged) == 16
