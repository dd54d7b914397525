"""Responses to the verifiers and back, whatever the verifiers do."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_m1.errors import InputError
from megatron_m1.rl import tasks
from megatron_m1.rl.rewards.config import GenerativeConfig, RewardConfig, VerifierConfig
from megatron_m1.rl.rewards.scorer import Scorer, reward_metrics
from megatron_m1.rl.samples import Prompt, Response, Scored
from megatron_m1.rl.sandbox.config import SandboxConfig
from megatron_m1.rl.sandbox.outcome import SandboxUnavailable
from tests.rl.rewards.judge_server import Reply, judge_server

OWN = VerifierConfig("own*", file=str(Path(__file__).with_name("verifiers_of_tests.py")))


def prompt(data_source: str = "own", ground_truth: Any = None, **extra_info: Any) -> Prompt:
    return Prompt(0, data_source, "the question", ground_truth, extra_info)


def response(text: str) -> Response:
    """Tokens are letters here."""
    tokens = [ord(letter) for letter in text]
    return Response(0, 0, tokens, [], [], [], "stop")


def decode(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


@contextmanager
def scorer(**config: Any) -> Iterator[Scorer]:
    given = {"slots": 2, "seconds": 10.0, "verifiers": [OWN]}
    with Scorer(RewardConfig(**{**given, **config}), decode) as opened:
        yield opened


@pytest.fixture(scope="module")
def shared() -> Iterator[Scorer]:
    with scorer() as opened:
        yield opened


def judged(opened: Scorer, *texts: str, **info: Any) -> list[Scored]:
    return opened.score_all([(prompt(**info), response(text)) for text in texts])


def test_rewards_come_in_the_order_of_the_responses(shared: Scorer) -> None:
    texts = [f"score {number}" for number in range(20)]
    found = judged(shared, *texts, level=3)
    assert [one.reward for one in found] == list(range(20))
    assert [decode(one.response.tokens) for one in found] == texts
    assert {one.details["level"] for one in found} == {3.0}
    assert not any(one.failed for one in found)


def test_slots_are_processes_that_are_used_again(shared: Scorer) -> None:
    found = [judged(shared, *["score 1"] * 6) for _ in range(2)]
    used = {one.details["process"] for batch in found for one in batch}
    assert 1 <= len(used) <= 2
    assert os.getpid() not in used


@pytest.mark.parametrize(
    "text",
    ["raise oh", "exit 0", "exit 3", "die 9", "die 11", "text nan", "text 1.0", "unheard of"],
)
def test_a_verifier_that_fails(shared: Scorer, text: str) -> None:
    found = judged(shared, text, "score 1", text, "score 2")
    assert [(one.reward, one.failed) for one in found] == [
        *((0.0, True), (1.0, False), (0.0, True), (2.0, False))
    ]
    assert all("timeout" not in one.details for one in found)


def test_the_reason_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), scorer() as opened:
        judged(opened, "raise oh", "raise oh", "raise no")
    said = [record.message for record in caplog.records]
    assert sorted(said) == [
        f"no reward for a response to own: ValueError: {why}" for why in ("no", "oh")
    ]


@pytest.mark.parametrize("text", ["sleep 1000", "stuck"])
def test_a_verifier_that_hangs_costs_its_slot_no_more_than_its_time(text: str) -> None:
    with scorer(seconds=1.0) as opened:
        judged(opened, "score 1", "score 1")  # both slots have started
        started = time.monotonic()
        found = judged(opened, text, *["sleep 0.1"] * 8)
        elapsed = time.monotonic() - started
        assert [one.failed for one in found] == [True] + [False] * 8
        assert found[0].details == {"timeout": 1.0}
        assert elapsed < 8
        assert not judged(opened, "score 1")[0].failed


def test_what_a_verifier_started_ends_with_its_slot(tmp_path: Path) -> None:
    with scorer(slots=1, seconds=1.0) as opened:
        (found,) = judged(opened, f"start {tmp_path / 'process'}")
        assert found.failed
    started = int((tmp_path / "process").read_text())
    with suppress(psutil.NoSuchProcess):
        assert psutil.Process(started).status() == psutil.STATUS_ZOMBIE


def test_every_slot_hangs_and_is_there_again() -> None:
    with scorer(seconds=0.5) as opened:
        found = judged(opened, *["stuck"] * 4, "score 5")
    assert [one.failed for one in found] == [True] * 4 + [False]
    assert found[-1].reward == 5.0


def test_processes_end_with_the_scorer() -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with scorer(seconds=60.0) as opened:
        judged(opened, "score 1", "score 1")
        late = opened.submit(prompt(), response("stuck"))
        waiting = [opened.submit(prompt(), response("sleep 50")) for _ in range(5)]
        time.sleep(0.2)
        started = {child.pid for child in psutil.Process().children(recursive=True)} - before
        assert 1 <= len(started) <= 2
    assert not started & {child.pid for child in psutil.Process().children(recursive=True)}
    assert late.result(5).failed
    assert all(one.cancelled() or one.done() for one in waiting)


def test_a_verifier_that_takes_all_memory() -> None:
    with scorer(memory_mb=512) as opened:
        found = judged(opened, "grow 2000", "grow 10")
    assert [one.failed for one in found] == [True, False]


def test_verifiers_have_a_main_thread_and_no_torch(shared: Scorer) -> None:
    assert [one.reward for one in judged(shared, "alarm", "torch", "print x")] == [1.0, 0.0, 1.0]


def test_styles_get_the_tokens(tmp_path: Path) -> None:
    file = tmp_path / "trl.py"
    file.write_text(
        "def compute_score(prompts, completions, completion_ids, **columns):\n"
        "    return [len(completion_ids[0])]\n"
    )
    with scorer(verifiers=[VerifierConfig("own", file=str(file), style="trl")]) as opened:
        assert judged(opened, "five!")[0].reward == 5.0


def test_generated_tasks_are_judged_without_processes() -> None:
    pairs = []
    for name in tasks.TASKS:
        problem = tasks.make_task(name).problem(__import__("random").Random(1))
        for text in (problem.answer, f"{problem.answer}?"):
            pairs.append((prompt(name, problem.ground_truth), response(text)))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with scorer() as opened:
        found = opened.score_all(pairs)
        assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    assert [one.reward for one in found] == [1.0, 0.0] * len(tasks.TASKS)


def test_a_generated_task_with_a_truth_that_breaks_its_verifier() -> None:
    with scorer() as opened:
        (found,) = opened.score_all([(prompt("countdown", {}), response("1+1"))])
    assert found.failed


def test_mathematics_in_a_slot() -> None:
    with scorer(seconds=5.0) as opened:
        right = (prompt("math_dapo", "1/2"), response(r"\boxed{0.5}"))
        endless = (prompt("math_dapo", "3"), response(r"\boxed{9^{9^{9^{9^9}}}-9^{9^{9^{9^8}}}}"))
        unclear = (prompt("math_dapo", ""), response(r"\boxed{0.5}"))
        found = opened.score_all([right, endless, unclear, right])
    assert [one.reward for one in found] == [1.0, 0.0, 0.0, 1.0]
    assert [one.failed for one in found][2:] == [True, False]


def test_programs_in_a_slot(sandbox_config: SandboxConfig) -> None:
    tests = {"inputs": ["2"], "outputs": ["4"]}
    with scorer(sandbox=sandbox_config, format_bonus=0.5) as opened:
        opened.prepare(["apps"])
        texts = ("```python\nprint(int(input()) ** 2)\n```", "print(4)", "```python\nprint(5)\n```")
        found = opened.score_all([(prompt("apps", tests), response(text)) for text in texts])
    assert [one.reward for one in found] == [1.5, 1.0, 0.5]


def test_a_judge_in_threads() -> None:
    def answer(question: str, number: int) -> Reply:
        return Reply("GRADE: 5" if "good" in question else "nothing to say", delay=0.2)

    with judge_server(answer) as server:
        generative = GenerativeConfig(url=server.url, concurrent=8)
        with scorer(generative=generative) as opened:
            opened.prepare(["grade/x"])
            started = time.monotonic()
            texts = ["good", "bad"] * 8
            pairs = [(prompt("grade/x", "truth"), response(text)) for text in texts]
            found = opened.score_all(pairs)
    assert time.monotonic() - started < 2.5
    assert [(one.reward, one.failed) for one in found] == [(1.0, False), (0.0, True)] * 8
    assert "the question" in server.questions[0]


def test_what_cannot_work_at_all_ends_the_run(tmp_path: Path) -> None:
    with scorer(verifiers=[VerifierConfig("own", file=str(tmp_path / "none.py"))]) as opened:
        with pytest.raises(InputError, match="none.py, the file of the verifier"):
            judged(opened, "score 1")
        with pytest.raises(InputError, match="no verifier is known for data_source=unheard"):
            opened.prepare(["own", "unheard"])


def test_a_sandbox_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with scorer(sandbox=SandboxConfig()) as opened:
        with pytest.raises(SandboxUnavailable, match="needs the program bwrap"):
            opened.prepare(["apps"])
        with pytest.raises(InputError, match="needs the program bwrap"):
            opened.score_all([(prompt("apps", {"inputs": ["1"], "outputs": ["1"]}), response("x"))])


def test_metrics() -> None:
    def scored(reward: float, failed: bool = False, **details: float) -> Scored:
        return Scored(response(""), reward, details, failed)

    given = [
        scored(1.0, format=1.0),
        scored(0.0),
        scored(0.0, True),
        scored(0.0, True, timeout=1.0),
    ]
    sources = ["a/b", "a/b", "a/b", "c"]
    assert reward_metrics(sources, given) == {
        "reward/failed": 2.0,
        "reward/timeouts": 1.0,
        "reward/a/b/score": 0.5,
        "reward/a/b/format": 1.0,
    }
