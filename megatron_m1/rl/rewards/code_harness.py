"""Runs in the sandbox, by itself: a program, and then questions to it.

Reads one JSON object from standard input, and prints a line a question: the nonce, the question's
number, and a JSON text, which is the value as a Python literal, or ``True`` for statements that
ran. A question without a line was not answered. The nonce and the questions are gone from standard
input before the program runs, and what the program prints goes nowhere.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import types
from typing import Any

# What programs for judges that call functions take for granted.
_TAKEN_FOR_GRANTED = """
import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string
from typing import *
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
"""


def main() -> None:
    request = json.load(sys.stdin)
    out = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(nowhere, stream)
    signal.signal(signal.SIGALRM, time_is_up)
    # Tests of some data sets import the program as "solution".
    module = sys.modules["solution"] = types.ModuleType("solution")
    try:
        if any("call" in question for question in request["questions"]):
            exec(_TAKEN_FOR_GRANTED, module.__dict__)
        exec(compile(request["program"], "program.py", "exec"), module.__dict__)
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(1)
    for number, question in enumerate(request["questions"]):
        try:
            signal.setitimer(signal.ITIMER_REAL, request["seconds"])
            answer = ask(question, module)
            signal.setitimer(signal.ITIMER_REAL, 0)
            line = f"{request['nonce']} {number} {json.dumps(answer)}\n".encode()
        except BaseException as error:
            sys.stderr.write(f"{number}: {type(error).__name__}: {error}\n")
            continue
        while line:
            line = line[os.write(out, line) :]
    os._exit(0)


def ask(question: dict[str, Any], module: types.ModuleType) -> str:
    namespace = module.__dict__
    if "statements" in question:
        exec(compile(question["statements"], "test.py", "exec"), namespace)
        return "True"
    if "expression" in question:
        return repr(plain(eval(question["expression"], namespace)))
    owner = namespace["Solution"]() if "Solution" in namespace else module
    return repr(plain(getattr(owner, question["call"])(*question["arguments"])))


_SCALARS: tuple[Any, ...] = (str, bytes, bool, int, float, complex)
_SEQUENCES: tuple[Any, ...] = (list, tuple, set, frozenset)


def plain(value: Any) -> Any:
    """The value in Python's own types, of which literals are made; others stay as they are."""
    if hasattr(value, "tolist"):  # arrays and numbers of numpy
        value = value.tolist()
    for kind in _SCALARS:
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in dict.items(value)}
    for kind in _SEQUENCES:
        if isinstance(value, kind):
            items = [plain(item) for item in kind.__iter__(value)]
            return set(items) if kind is frozenset else kind(items)
    return value


def time_is_up(*_: object) -> None:
    raise TimeoutError("time is up")


if __name__ == "__main__":
    main()
