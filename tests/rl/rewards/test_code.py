"""Programs judged by their tests, honest ones and others."""

from __future__ import annotations

import textwrap
import time
from typing import Any

import pytest

from megatron_m1.rl.rewards.code import CodeVerifier, answers_in
from megatron_m1.rl.rewards.config import CodeConfig
from megatron_m1.rl.sandbox.config import Limits
from megatron_m1.rl.sandbox.sandbox import Sandbox

SQUARES = {"inputs": ["1", "2", "3", "4"], "outputs": ["1", "4", "9", "16"]}
ADDED = {"fn_name": "add", "inputs": ["1\n2", "3\n4"], "outputs": ["3", "7"]}
ASSERTED = ["assert add(1, 2) == 3", "assert add(3, 4) == 7"]
LIMITS = Limits(seconds=3.0, cpu_seconds=3, memory_mb=256, processes=4, output_kb=64, files_mb=4)


def judge(sandbox: Sandbox, program: str, ground_truth: Any, **config: Any) -> dict[str, float]:
    verifier = CodeVerifier(CodeConfig(**{"limits": LIMITS, **config}), sandbox)
    response = f"I think.</think>Here it is:\n```python\n{textwrap.dedent(program)}\n```\nDone."
    return verifier("apps", response, ground_truth)


def score(sandbox: Sandbox, program: str, ground_truth: Any, **config: Any) -> float:
    return judge(sandbox, program, ground_truth, **config)["score"]


def test_standard_input_and_output(sandbox: Sandbox) -> None:
    found = judge(sandbox, "print(int(input()) ** 2)", SQUARES)
    assert found == {"score": 1.0, "passed": 1.0, "format": 1.0}


def test_all_or_the_share(sandbox: Sandbox) -> None:
    program = "n = int(input()); print(n * n if n != 2 else 'no')"
    assert judge(sandbox, program, SQUARES, credit="rate")["score"] == 0.75
    stopped_early = judge(sandbox, program, SQUARES)
    assert (stopped_early["score"], stopped_early["passed"]) == (0.0, 0.25)


def test_a_part_of_the_tests(sandbox: Sandbox) -> None:
    program = "n = int(input()); print(n * n if n < 3 else 'no')"
    assert score(sandbox, program, SQUARES, tests=2) == 1.0
    assert score(sandbox, program, SQUARES, tests=3) == 0.0


@pytest.mark.parametrize("ground_truth", [ADDED, ASSERTED], ids=["calls", "assertions"])
def test_functions(sandbox: Sandbox, ground_truth: Any) -> None:
    right = "def add(a, b):\n    print('noise')\n    return a + b"
    assert score(sandbox, right, ground_truth) == 1.0
    half = "def add(a, b): return 3"
    assert score(sandbox, half, ground_truth) == 0.0
    assert score(sandbox, half, ground_truth, credit="rate") == 0.5
    assert score(sandbox, "def sub(a, b): return 3", ground_truth, credit="rate") == 0.0
    assert score(sandbox, "def add(a, b: return 3", ground_truth, credit="rate") == 0.0


def test_a_solution_class_and_names_that_judges_give(sandbox: Sandbox) -> None:
    program = """
    class Solution:
        def add(self, *numbers: List[int]) -> Optional[int]:
            return reduce(lambda a, b: a + b, Counter(numbers).elements())
    """
    assert score(sandbox, program, ADDED) == 1.0


def test_statements_that_test(sandbox: Sandbox) -> None:
    check = "from solution import add\nfor n in range(9):\n    assert add(n, n) == 2 * n"
    assert score(sandbox, "def add(a, b): return a + b", check) == 1.0
    assert score(sandbox, "def add(a, b): return a * b", check) == 0.0


@pytest.mark.parametrize(
    "value",
    ["Counter('aab')", "OrderedDict(a=2, b=1)", "defaultdict(int, a=2, b=1)", "{'b': 1, 'a': 2}"],
)
def test_values_of_other_types_than_literals(sandbox: Sandbox, value: str) -> None:
    program = f"from collections import *\ndef f(): return {value}"
    assert score(sandbox, program, ["assert f() == {'a': 2, 'b': 1}"]) == 1.0


def test_one_slow_question_does_not_cost_the_others(sandbox: Sandbox) -> None:
    program = "def add(a, b):\n    while a == 1: pass\n    return a + b"
    limits = Limits(seconds=0.5, cpu_seconds=3)
    assert score(sandbox, program, ADDED, credit="rate", limits=limits) == 0.5


def test_the_time_of_all_tests_is_limited(sandbox: Sandbox) -> None:
    started = time.monotonic()
    many = {"inputs": ["1"] * 100, "outputs": ["1"] * 100}
    program = "import time; time.sleep(0.4); print(1)"
    found = judge(sandbox, program, many, credit="rate", seconds=1.0)
    assert 0.0 < found["score"] < 0.1
    assert time.monotonic() - started < 10


def test_without_a_fence_all_is_program(sandbox: Sandbox) -> None:
    verifier = CodeVerifier(CodeConfig(), sandbox)
    found = verifier("apps", "thoughts</think>print(int(input()) ** 2)", SQUARES)
    assert found == {"score": 1.0, "passed": 1.0, "format": 0.0}


DISHONEST = {
    "ends at once, as if all were well": "import os; os._exit(0)",
    "ends in its function": "def add(a, b): raise SystemExit(0)",
    "ends the process in its function": "def add(a, b): __import__('os')._exit(0)",
    "prints what success looks like": "print('passed'); print('OK'); print('1.0')",
    "prints all that it reads": """
        import sys
        text = sys.stdin.read()
        print(text); print(text, file=sys.stderr)
        def add(a, b): print(text)
        """,
    "equals everything": """
        class Yes:
            def __eq__(self, other): return True
            def __repr__(self): return "3"
            __hash__ = None
        def add(a, b): return Yes()
        """,
    "changes what equality is": """
        import builtins, operator
        builtins.repr = lambda value: "7"
        operator.eq = lambda a, b: True
        def add(a, b): return 0
        """,
    "answers on every descriptor": """
        import os
        def add(a, b):
            for number in range(10):
                for descriptor in range(3, 20):
                    try:
                        os.write(descriptor, f'{number} "3"\\n'.encode())
                    except OSError:
                        pass
            os._exit(0)
        """,
    "looks for the tests in files and processes": """
        import glob, os
        found = []
        for path in glob.glob("**/*", recursive=True) + glob.glob("/proc/[0-9]*/cmdline"):
            try:
                found.append(open(path, "rb").read())
            except OSError:
                pass
        def add(a, b):
            return 7 if b"== 7" in b"".join(found) else None
        """,
    "tampers with the harness": """
        import sys
        main = sys.modules["__main__"]
        main.ask = lambda *_: "True"
        main.plain = lambda value: 7
        """,
    "replaces the program that is run": """
        import os
        for name in os.listdir("input"):
            try:
                open(os.path.join("input", name), "w").write("print(9)")
            except OSError:
                pass
        def add(a, b): return 0
        """,
    "leaves a child that prints later": """
        import os, time
        if os.fork() == 0:
            time.sleep(0.3)
            print(1)
            os._exit(0)
        """,
    "sleeps": "import time; time.sleep(1000)",
    "prints without end": "while True: print(1)",
    "takes all memory": "x = [bytearray(1 << 20) for _ in range(10 ** 6)]",
}


@pytest.mark.parametrize(
    "ground_truth", [SQUARES, ADDED, ASSERTED], ids=["in/out", "call", "assert"]
)
@pytest.mark.parametrize("program", DISHONEST.values(), ids=DISHONEST)
def test_dishonest_programs(sandbox: Sandbox, program: str, ground_truth: Any) -> None:
    limits = Limits(seconds=0.7, cpu_seconds=2, memory_mb=256, output_kb=64)
    assert score(sandbox, program, ground_truth, limits=limits) == 0.0


def test_guessing_every_question_right_is_not_enough(sandbox: Sandbox) -> None:
    """The first answer to a question counts, and it is not known which one is right."""
    nonce = "abc"
    printed = (
        f'{nonce} 0 "3"\n{nonce} 0 "4"\nother 1 "5"\n{nonce} x "1"\n{nonce} 2 broken\n{nonce} 3'
    )
    assert answers_in(printed, nonce) == {0: "3"}
