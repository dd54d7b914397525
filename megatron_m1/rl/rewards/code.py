"""Programs judged by their tests, in the sandbox."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_m1.rl.rewards.answers import after_thoughts, last_fenced
from megatron_m1.rl.rewards.code_tests import Printed, Ran, Returned, read_tests
from megatron_m1.rl.rewards.config import CodeConfig
from megatron_m1.rl.sandbox.config import Limits
from megatron_m1.rl.sandbox.sandbox import Sandbox

_PYTHON = ("python", "python3", "py")
_HARNESS = Path(__file__).with_name("code_harness.py")


class CodeVerifier:
    """Runs the last fenced Python program of a response, or the whole of one without fences.

    Beside the score: ``passed``, the share of tests; ``format``, whether there was a fence.
    """

    def __init__(self, config: CodeConfig, sandbox: Sandbox) -> None:
        self._config, self._sandbox = config, sandbox

    def __call__(
        self,
        data_source: str,
        solution_str: str,
        ground_truth: Any,
        extra_info: dict[str, Any] | None = None,
    ) -> dict[str, float]:
        tests = read_tests(ground_truth)[: self._config.tests or None]
        fenced = last_fenced(solution_str, _PYTHON)
        program = after_thoughts(solution_str) if fenced is None else fenced
        printed = [test for test in tests if isinstance(test, Printed)]
        asked = [test for test in tests if not isinstance(test, Printed)]
        passed = self._printed(program, printed) + self._answered(program, asked)
        share = passed / len(tests)
        score = share if self._config.credit == "rate" else float(passed == len(tests))
        return {"score": score, "passed": share, "format": float(fenced is not None)}

    def _printed(self, program: str, tests: Sequence[Printed]) -> int:
        """How many tests pass, each in a sandbox of its own; where all must, up to the first that
        does not."""
        files = {"program.py": program.encode(errors="replace")}
        end = time.monotonic() + self._config.seconds
        passed = 0
        for test in tests:
            left = end - time.monotonic()
            if left <= 0:
                break
            limits = self._config.limits
            outcome = self._sandbox.run(
                [self._sandbox.python, "-I", "-B", "input/program.py"],
                replace(limits, seconds=min(limits.seconds, left)),
                files=files,
                stdin=test.stdin.encode(),
            )
            right = outcome.status == 0 and test.is_passed(outcome.stdout.decode(errors="replace"))
            passed += right
            if not right and self._config.credit == "all":
                break
        return passed

    def _answered(self, program: str, tests: Sequence[Returned | Ran]) -> int:
        """How many questions get the right answer, asked one after another of one process."""
        if not tests:
            return 0
        nonce = secrets.token_hex(16)
        request = {
            "nonce": nonce,
            "program": program,
            "questions": [test.question for test in tests],
            "seconds": self._config.limits.seconds,
        }
        outcome = self._sandbox.run(
            [self._sandbox.python, "-I", "-B", "input/harness.py"],
            self._limits_of_all(len(tests)),
            files={"harness.py": _HARNESS.read_bytes()},
            stdin=json.dumps(request).encode(),
        )
        answers = answers_in(outcome.stdout.decode(errors="replace"), nonce)
        return sum(
            number in answers and test.is_passed(answers[number])
            for number, test in enumerate(tests)
        )

    def _limits_of_all(self, tests: int) -> Limits:
        limits, whole = self._config.limits, self._config.seconds
        return replace(
            limits,
            seconds=min(limits.seconds * tests, whole),
            cpu_seconds=min(limits.cpu_seconds * tests, int(whole) + 1),
        )


def answers_in(printed: str, nonce: str) -> dict[int, str]:
    """The answers by number, from lines that begin with the nonce; the first of a number counts."""
    found: dict[int, str] = {}
    for line in printed.splitlines():
        words = line.split(" ", 2)
        if len(words) == 3 and words[0] == nonce and words[1].isdigit():
            try:
                answer = json.loads(words[2])
            except ValueError:
                continue
            found.setdefault(int(words[1]), str(answer))
    return found
