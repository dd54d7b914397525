"""Tests of programs, in the forms that data sets give them, and what a right result is.

What a test expects stays out of the sandbox wherever it is a plain value: a program that digs in
its own interpreter finds the questions, not the answers.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_m1.rl.rewards.verdict import VerifierFailed

_TOLERANCE = 1e-6
_UNREADABLE = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)


@dataclass(frozen=True)
class Printed:
    """A program gets ``stdin`` and must print ``stdout``."""

    stdin: str
    stdout: str

    def is_passed(self, printed: str) -> bool:
        """Whether the lines are the same but for white space at their ends, or the words are, of
        which numbers may differ in the seventh digit."""
        if _lines(printed) == _lines(self.stdout):
            return True
        found, expected = printed.split(), self.stdout.split()
        return len(found) == len(expected) and all(map(_same_word, found, expected))


@dataclass(frozen=True)
class Returned:
    """A call or expression must have a value. ``exactly`` is Python's ``==``; else sequences of
    any kind are alike, and floats may differ in the seventh digit."""

    question: dict[str, Any]
    value: Any
    exactly: bool

    def is_passed(self, answer: str) -> bool:
        """Whether the literal that came back is the value."""
        try:
            found = ast.literal_eval(answer)
        except _UNREADABLE:
            return False
        if self.exactly:
            return bool(found == self.value)
        return _same_value(found, self.value) or (
            # Data sets of competitions put the value into a list of one.
            isinstance(self.value, list)
            and len(self.value) == 1
            and _same_value(found, self.value[0])
        )


@dataclass(frozen=True)
class Ran:
    """Statements must run without an exception; only the sandbox can say."""

    question: dict[str, Any]

    def is_passed(self, answer: str) -> bool:
        return answer == "True"


Test = Printed | Returned | Ran


def read_tests(ground_truth: Any) -> list[Test]:
    """The tests of a ground truth, a dictionary or its JSON:

    ``{"inputs": [...], "outputs": [...]}`` for standard input and output; with ``"fn_name"``, for
    calls; ``{"assert_case": [...]}`` or a list of ``assert`` statements; ``{"functional": "..."}``,
    statements that test the program.

    Raises:
        VerifierFailed: it is none of these.
    """
    given = _from_json(ground_truth)
    if isinstance(given, list):
        given = {"assert_case": given}
    try:
        tests = _tests(given)
    except (AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
        shown = str(ground_truth)[:200]
        raise VerifierFailed(f"the tests {shown!r} are not understood: {error!r}") from error
    if not tests:
        raise VerifierFailed("the ground truth holds no tests")
    return tests


def _from_json(ground_truth: Any) -> Any:
    if not isinstance(ground_truth, str):
        return ground_truth
    try:
        return json.loads(ground_truth)
    except ValueError:
        return {"functional": ground_truth}


def _tests(given: Mapping[str, Any]) -> list[Test]:
    if given.get("functional"):
        return [Ran({"statements": given["functional"]})]
    if given.get("assert_case"):
        return [_assertion(source) for source in given["assert_case"]]
    pairs = zip(given["inputs"], given["outputs"], strict=True)
    if given.get("fn_name"):
        return [_call(given["fn_name"], *pair) for pair in pairs]
    return [Printed(_text(stdin), _text(stdout)) for stdin, stdout in pairs]


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _call(name: str, arguments: Any, value: Any) -> Test:
    """A call, whose arguments are a list, or JSON values a line of text."""
    if isinstance(arguments, str):
        arguments = [json.loads(line) for line in arguments.splitlines()]
    if isinstance(value, str):
        value = json.loads(value)
    return Returned({"call": name, "arguments": arguments}, value, exactly=False)


def _assertion(source: str) -> Test:
    """An ``assert`` that compares with a literal asks for a value; another one is run."""
    body = ast.parse(source).body
    if len(body) == 1 and isinstance(body[0], ast.Assert):
        found = _compared_with_literal(body[0].test)
        if found is not None:
            expression, value = found
            return Returned({"expression": ast.unparse(expression)}, value, exactly=True)
    return Ran({"statements": source})


def _compared_with_literal(test: ast.expr) -> tuple[ast.expr, Any] | None:
    if not isinstance(test, ast.Compare) or len(test.ops) != 1:
        return None
    sides = [(test.left, test.comparators[0]), (test.comparators[0], test.left)]
    for expression, literal in sides:
        try:
            value = ast.literal_eval(literal)
        except _UNREADABLE:
            continue
        if isinstance(test.ops[0], ast.Eq) or (isinstance(test.ops[0], ast.Is) and value is None):
            return expression, value
    return None


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _same_word(found: str, expected: str) -> bool:
    return found == expected or _near(_as_number(found), _as_number(expected))


def _as_number(word: str) -> float | None:
    """Only what holds a point or an exponent: whole numbers must be exact."""
    if len(word) > 64 or not set(".eE") & set(word):
        return None
    try:
        return float(word)
    except ValueError:
        return None


def _near(found: float | None, expected: float | None) -> bool:
    if found is None or expected is None:
        return False
    return math.isclose(found, expected, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)


def _same_value(found: Any, expected: Any) -> bool:
    if isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(_same_value, found, expected))
    if isinstance(found, dict) and isinstance(expected, dict):
        # JSON has no keys but text.
        ours, theirs = ({str(k): v for k, v in side.items()} for side in (found, expected))
        return ours.keys() == theirs.keys() and all(_same_value(ours[k], theirs[k]) for k in ours)
    if isinstance(found, float) and isinstance(expected, float | int):
        return _near(found, float(expected))
    return bool(found == expected)
