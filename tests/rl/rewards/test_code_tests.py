"""Tests in the forms of data sets, and what they accept."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_m1.rl.rewards.code_tests import Printed, Ran, Returned, read_tests
from megatron_m1.rl.rewards.verdict import VerifierFailed


def test_standard_input_and_output() -> None:
    given = {"inputs": ["1\n", ["2", "3"]], "outputs": ["1\n", ["4", "5"]]}
    expected = [Printed("1\n", "1\n"), Printed("2\n3", "4\n5")]
    assert read_tests(given) == read_tests(json.dumps(given)) == expected


def test_calls() -> None:
    given = {"fn_name": "add", "inputs": ["1\n[2, 3]", [1, [2, 3]]], "outputs": ["6", 6]}
    question = {"call": "add", "arguments": [1, [2, 3]]}
    assert read_tests(given) == [Returned(question, 6, exactly=False)] * 2


@pytest.mark.parametrize(
    ("source", "expression", "value"),
    [
        ("assert f(1) == [2, 3]", "f(1)", [2, 3]),
        ("assert f(1) == -2, 'a message'", "f(1)", -2),
        ("assert {1, 2} == f('x')", "f('x')", {1, 2}),
        ("assert sorted(f(1)) == (1, 'a')", "sorted(f(1))", (1, "a")),
        ("assert f(1) is None", "f(1)", None),
    ],
)
def test_assertions_that_ask_for_a_value(source: str, expression: str, value: Any) -> None:
    expected = [Returned({"expression": expression}, value, exactly=True)]
    assert read_tests([source]) == read_tests({"assert_case": [source]}) == expected


@pytest.mark.parametrize(
    "source",
    [
        "assert f(1)",
        "assert not f(1)",
        "assert f(1) != 2",
        "assert f(1) == g(1)",
        "assert 1 < f(1) < 3",
        "assert f(1) is True",
        "x = f(1)\nassert x == 2",
    ],
)
def test_assertions_that_must_be_run(source: str) -> None:
    assert read_tests([source]) == [Ran({"statements": source})]


def test_statements() -> None:
    source = "def check(f):\n    assert f(1) == 2\ncheck(f)"
    expected = [Ran({"statements": source})]
    assert read_tests({"functional": source}) == read_tests(source) == expected


@pytest.mark.parametrize(
    "given",
    [
        {},
        [],
        None,
        7,
        {"inputs": ["1"]},
        {"inputs": ["1"], "outputs": []},
        {"inputs": [], "outputs": []},
        {"fn_name": "f", "inputs": ["{"], "outputs": ["1"]},
        ["assert f( == 1"],
    ],
)
def test_what_is_not_understood(given: Any) -> None:
    with pytest.raises(VerifierFailed, match="not understood|holds no tests"):
        read_tests(given)


@pytest.mark.parametrize(
    ("expected", "printed"),
    [
        ("1\n2\n", "1\n2"),
        ("1\n2", "1 \n2\n\n"),
        ("1 2", "1\n2"),
        ("0.333333", "0.3333333333"),
        ("1e-9", "0.0"),
        ("Yes", "Yes\r\n"),
        ("", "\n"),
    ],
)
def test_printed_as_expected(expected: str, printed: str) -> None:
    assert Printed("", expected).is_passed(printed)


@pytest.mark.parametrize(
    ("expected", "printed"),
    [
        ("1", "2"),
        ("1", "1 1"),
        ("1", ""),
        ("Yes", "yes"),
        ("0.3333", "0.3334"),
        ("1000000000001", "1000000000000"),
        ("1.0", "nan"),
        ("1.0", "1e" + "9" * 100),
    ],
)
def test_not_printed_as_expected(expected: str, printed: str) -> None:
    assert not Printed("", expected).is_passed(printed)


@pytest.mark.parametrize(
    ("value", "answer", "exactly"),
    [
        ([1, 2], "[1, 2]", True),
        ((1, 2), "(1, 2)", True),
        ({1}, "{1}", True),
        ([1, 2], "(1, 2)", False),
        ([[1, 2]], "[1, 2]", False),
        ([[1], [2]], "[(1,), (2,)]", False),
        ({"1": 2}, "{1: 2}", False),
        (0.3, "0.30000000000000004", False),
        (2, "2.0", False),
    ],
)
def test_values_that_are_right(value: Any, answer: str, exactly: bool) -> None:
    assert Returned({}, value, exactly).is_passed(answer)


@pytest.mark.parametrize(
    ("value", "answer", "exactly"),
    [
        ([1, 2], "(1, 2)", True),
        (0.3, "0.30000000000000004", True),
        ([1, 2], "[1, 3]", False),
        ([1, 2], "[1]", False),
        ({"1": 2}, "{1: 3}", False),
        (True, "<object at 0x7f>", True),
        (1, "__import__('os').getpid()", True),
        (1, "[" * 100_000, True),
        (1, "", False),
    ],
)
def test_values_that_are_wrong(value: Any, answer: str, exactly: bool) -> None:
    assert not Returned({}, value, exactly).is_passed(answer)
