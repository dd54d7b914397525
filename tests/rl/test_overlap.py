"""Batches that are drawn while others are trained on: never from weights that are too old."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_m1.data.tokenizer import Tokenizer, train_bpe
from megatron_m1.errors import InputError, UserError
from megatron_m1.rl.collecting import Batch, Collector
from megatron_m1.rl.journal import Journal
from megatron_m1.rl.overlap import OverlappedCollector
from megatron_m1.rl.recording import Judge, alone
from megatron_m1.rl.rollout.engine import Request
from megatron_m1.rl.samples import Prompt, Response, Scored
from parallel.layout import Layout
from tests.distributed import Pool
from tests.rl.drawing import DrawingEngine, Numbers, judge
from tests.rl.stored import rl_config

WINDOW = 30
STEPS = 6
PATIENCE = 20.0


class ElsewhereEngine(DrawingEngine):
    """Draws in threads of its own, four responses at a time, each by the weights that it begins
    with.

    Args:
        pause: called before a response begins and before it ends.
        most: it dies after so many responses.
    """

    def __init__(self, pause: Callable[[], None] = lambda: None, most: float = math.inf) -> None:
        super().__init__()
        self.pause, self.most = pause, most
        self.is_open = False
        self.stopping, self.beginning = threading.Event(), threading.Lock()
        self.begun: list[tuple[int, int, int]] = []  # prompt, index, version

    def open(self) -> None:
        self.is_open = True

    def responses(self, requests: Sequence[Request]) -> Iterator[Response]:
        assert self.is_open
        assert threading.current_thread() is not threading.main_thread()
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(self._draw, request) for request in requests]
            for finished in as_completed(asked):
                response = finished.result()
                if response is not None:
                    yield response
        if len(self.begun) >= self.most:
            raise Killed

    def stop(self) -> None:
        self.stopping.set()

    def _draw(self, request: Request) -> Response | None:
        self.pause()
        with self.beginning:
            if self.stopping.is_set() or len(self.begun) >= self.most:
                return None
            version = self.version
            self.begun.append((request.prompt_id, request.index, version))
        self.pause()
        response = self._respond(request)
        return replace(response, versions=[version] * len(response.tokens))


class Killed(Exception):
    pass


class Pauses:
    """Of random length, most of them short."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def __call__(self) -> None:
        time.sleep(self.random.expovariate(1 / 0.002))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["0123456789"], 257)


def overlapped(
    folder: Path,
    tokenizer: Tokenizer,
    engine: ElsewhereEngine,
    max_staleness: int = 1,
    judge: Judge = judge,
) -> OverlappedCollector:
    config = rl_config("unused")
    collector = Collector(
        Numbers(), tokenizer, engine.responses, judge, config, folder, "mark", share=alone
    )
    return OverlappedCollector(collector, engine, max_staleness, STEPS)


def in_turn(folder: Path, tokenizer: Tokenizer) -> list[Batch]:
    """The batches of a run that draws and trains in turn."""
    engine, found = DrawingEngine(), []
    config = rl_config("unused")
    source = Collector(Numbers(), tokenizer, engine.generate, judge, config, folder, "mark")
    for step in range(STEPS):
        found.append(source.collect(step, WINDOW))
        engine.weights_changed(step + 1)
    return found


def train(
    source: OverlappedCollector,
    engine: ElsewhereEngine,
    first: int = 0,
    steps: int = STEPS,
    update: Callable[[], None] = lambda: None,
) -> list[Batch]:
    found = []
    for step in range(first, steps):
        found.append(source.collect(step, WINDOW))
        update()
        engine.weights_changed(step + 1)
    return found


def shown(batches: Sequence[Batch], *, versions: bool = False) -> list[Any]:
    """What steps train on and what they judged, without the versions that drew it."""

    def plain(scored: Scored) -> dict[str, Any]:
        values = asdict(scored)
        if not versions:
            del values["response"]["versions"]
        return values

    return [
        (
            [[plain(scored) for scored in group.scored] for group in batch.groups],
            [plain(scored) for _, scored in batch.judged],
            batch.next_prompt,
        )
        for batch in batches
    ]


def ages(batches: Sequence[Batch], first: int = 0) -> list[int]:
    return [
        step - version
        for step, batch in enumerate(batches, first)
        for _, scored in batch.judged
        for version in scored.response.versions
    ]


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 4])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_token_is_older_than_allowed(
    single_process: Layout, tmp_path: Path, tokenizer: Tokenizer, max_staleness: int, seed: int
) -> None:
    engine = ElsewhereEngine(Pauses(seed))
    with overlapped(tmp_path / "a", tokenizer, engine, max_staleness) as source:
        batches = train(source, engine, update=Pauses(-seed))
    assert 0 <= min(ages(batches)) <= max(ages(batches)) <= max_staleness
    expected = in_turn(tmp_path / "b", tokenizer)
    assert shown(batches) == shown(expected)
    assert len(engine.begun) == len(set(engine.begun)) == sum(len(b.judged) for b in expected)


def test_without_staleness_batches_are_those_of_a_run_in_turn(
    single_process: Layout, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    engine = ElsewhereEngine()
    with overlapped(tmp_path / "a", tokenizer, engine, 0) as source:
        batches = train(source, engine)
    expected = in_turn(tmp_path / "b", tokenizer)
    assert shown(batches, versions=True) == shown(expected, versions=True)


@pytest.mark.parametrize("max_staleness", [1, 3])
def test_the_next_batches_are_drawn_before_an_update_ends(
    single_process: Layout, tmp_path: Path, tokenizer: Tokenizer, max_staleness: int
) -> None:
    """As many as allowed and no more, whatever the time; a slow update finds them finished."""
    engine = ElsewhereEngine()
    batches = in_turn(tmp_path / "b", tokenizer)
    asked = [sum(len(batch.judged) for batch in batches[:end]) for end in range(STEPS + 1)]
    with overlapped(tmp_path / "a", tokenizer, engine, max_staleness) as source:
        for step in range(STEPS):
            source.collect(step, WINDOW)
            allowed = asked[min(step + 1 + max_staleness, STEPS)]
            wait_until(lambda allowed=allowed: len(engine.begun) == allowed)
            time.sleep(0.02)
            assert len(engine.begun) == allowed
            engine.weights_changed(step + 1)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_responses_begun_after_an_update_are_of_its_weights(
    single_process: Layout, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """In the middle of a batch: those before it are older, and the batch knows both."""
    half, gate = threading.Event(), threading.Event()

    def pause() -> None:
        if len(engine.begun) >= 24:
            half.set()
            assert gate.wait(PATIENCE)

    engine = ElsewhereEngine(pause)
    with overlapped(tmp_path, tokenizer, engine) as source:
        gate.set()
        source.collect(0, WINDOW)
        gate.clear()
        wait_until(half.is_set)
        engine.weights_changed(1)
        gate.set()
        source.collect(1, WINDOW)
    versions = [version for _, _, version in engine.begun]
    assert versions == sorted(versions)
    assert set(versions) == {0, 1}


def test_a_batch_tells_how_long_it_was_held(
    single_process: Layout, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    engine = ElsewhereEngine()
    with overlapped(tmp_path, tokenizer, engine) as source:
        batches = train(source, engine, update=lambda: time.sleep(0.1))
    assert batches[0].held_seconds < 0.05
    assert all(batch.held_seconds > 0.03 for batch in batches[2:])


@pytest.mark.parametrize("most", [0, 3, 25, 61])
def test_what_the_thread_raises_reaches_the_loop(
    single_process: Layout, tmp_path: Path, tokenizer: Tokenizer, most: int
) -> None:
    engine = ElsewhereEngine(most=most)
    with overlapped(tmp_path, tokenizer, engine) as source, pytest.raises(Killed):
        train(source, engine)
    assert not threads()


def test_a_verifier_that_cannot_work_ends_the_run(
    single_process: Layout, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    def unusable(prompt: Prompt, response: Response) -> Future[Scored]:
        raise InputError("no verifier")

    engine = ElsewhereEngine()
    source = overlapped(tmp_path, tokenizer, engine, judge=unusable)
    with source, pytest.raises(InputError, match="no verifier"):
        train(source, engine)


def test_responses_without_logprobs_are_refused(
    single_process: Layout, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    class Silent(ElsewhereEngine):
        def _respond(self, request: Request) -> Response:
            response = super()._respond(request)
            return replace(response, raw_logprobs=[math.nan] * len(response.tokens))

    engine = Silent()
    with overlapped(tmp_path, tokenizer, engine) as source, pytest.raises(UserError, match="use 0"):
        train(source, engine)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "collecting"]


def test_a_stop_keeps_what_is_under_way_and_begins_nothing(
    single_process: Layout, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    gate, is_held = threading.Event(), threading.Event()

    def pause() -> None:
        if len(engine.begun) >= 22:
            is_held.set()
            assert gate.wait(PATIENCE)

    engine = ElsewhereEngine(pause)
    with overlapped(tmp_path, tokenizer, engine, 3) as source:
        gate.set()
        source.collect(0, WINDOW)
        wait_until(lambda: len(engine.begun) > 50)
        release = threading.Timer(0.05, gate.set)
        gate.clear()
        wait_until(lambda: bool(is_held.is_set()))
        before = len(engine.begun)
        release.start()
    assert not threads()
    assert len(engine.begun) - before <= 4
    assert kept(tmp_path) == sorted((prompt, index) for prompt, index, _ in engine.begun)


def kept(folder: Path) -> list[tuple[int, int]]:
    """The responses in the journals of all steps."""
    found: list[tuple[int, int]] = []
    for step in range(1, STEPS + 1):
        journal = Journal(folder, step, "mark")
        journal.close()
        found += journal.responses
    return sorted(found)


@pytest.mark.parametrize("max_staleness", [1, 2])
@pytest.mark.parametrize(("most", "back"), [(1, 0), (30, 0), (110, 1), (110, 3)])
def test_a_resumed_run_goes_on(
    single_process: Layout,
    tmp_path: Path,
    tokenizer: Tokenizer,
    max_staleness: int,
    most: int,
    back: int,
) -> None:
    """From a checkpoint some steps back: the same prompts, nothing drawn twice, nothing too old."""
    first = ElsewhereEngine(Pauses(most), most=most)
    saved = []
    with overlapped(tmp_path / "a", tokenizer, first, max_staleness) as source:
        saved.append(source.state_dict())
        with pytest.raises(Killed):
            for step in range(STEPS):
                source.collect(step, WINDOW)
                first.weights_changed(step + 1)
                # Time enough for the next batch to end before the checkpoint.
                time.sleep(0.1)
                saved.append(source.state_dict())
    expected = shown(in_turn(tmp_path / "b", tokenizer))
    step = max(len(saved) - 1 - back, 0)
    second = ElsewhereEngine(Pauses(-most))
    second.version = step
    with overlapped(tmp_path / "a", tokenizer, second, max_staleness) as source:
        source.load_state_dict(saved[step])
        batches = train(source, second, step)
    assert shown(batches) == expected[step:]
    assert max(ages(batches, step)) <= max_staleness
    drawn = [(prompt, index) for prompt, index, _ in first.begun + second.begun]
    assert len(set(drawn)) == len(drawn)


def test_no_batch_is_begun_for_a_step_that_never_comes(
    single_process: Layout, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    engine = ElsewhereEngine()
    with overlapped(tmp_path, tokenizer, engine, STEPS + 5) as source:
        batches = train(source, engine)
    assert len(engine.begun) == sum(len(batch.judged) for batch in batches)


def on_two(folder: Path, most: float) -> tuple[list[Any], int, str]:
    """What a rank sees of a run, how often its engine was asked, and its error."""
    Layout().build_groups()
    engine = ElsewhereEngine(Pauses(1), most)
    tokenizer = train_bpe(["0123456789"], 257)
    batches: list[Batch] = []
    error = ""
    with overlapped(folder / str(dist.get_rank()), tokenizer, engine) as source:
        try:
            for step in range(STEPS):
                batches.append(source.collect(step, WINDOW))
                engine.weights_changed(step + 1)
        except Exception as problem:
            error = type(problem).__name__
        state = source.state_dict()
    return [shown(batches, versions=True), state], len(engine.begun), error


def test_all_processes_have_the_batches_of_the_first(
    ranks: Callable[[int], Pool], tmp_path: Path, single_process: Layout, tokenizer: Tokenizer
) -> None:
    (first, asked, _), (second, asked_elsewhere, _) = ranks(2).run(on_two, tmp_path, math.inf)
    assert len(first[0]) == STEPS
    assert first == second
    assert asked > 0
    assert asked_elsewhere == 0


def test_an_error_of_the_thread_reaches_all_processes(
    ranks: Callable[[int], Pool], tmp_path: Path
) -> None:
    (first, _, error), (second, _, error_elsewhere) = ranks(2).run(on_two, tmp_path, 30)
    assert first == second
    assert (error, error_elsewhere) == ("Killed", "RuntimeError")
