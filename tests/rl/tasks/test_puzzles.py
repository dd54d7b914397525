"""Each task's problems against an independent solution of them."""

from __future__ import annotations

import re
from itertools import product
from random import Random

import pytest

from megatron_m1.rl.tasks import Problem, make_task


def problems(name: str, count: int = 100, seed: int = 0, **knobs: int | str) -> list[Problem]:
    task, random = make_task(name, **knobs), Random(seed)
    return [task.problem(random) for _ in range(count)]


@pytest.mark.parametrize("operators", ["+", "-", "*", "+-*"])
def test_arithmetic_is_pythons(operators):
    for problem in problems("arithmetic", digits=3, terms=5, operators=operators):
        sum_ = re.fullmatch(r"(\d+[-+*]){4}\d+=", problem.prompt)
        assert sum_ and problem.answer == str(eval(problem.prompt[:-1]))


def test_arithmetic_draws_every_length_of_numbers():
    numbers = [
        number
        for problem in problems("arithmetic", 500, digits=3)
        for number in re.findall(r"\d+", problem.prompt)
    ]
    shares = [sum(len(number) == digits for number in numbers) / len(numbers) for digits in (1, 2)]
    assert all(0.25 < share < 0.42 for share in shares)
    assert "0" in numbers and not any(number.startswith("0") for number in numbers if number != "0")


def test_sorting_is_by_value():
    drawn = problems("sorting", count=5, digits=2)
    for problem in drawn:
        given = problem.prompt.removeprefix("sort ").removesuffix("=").split()
        assert problem.answer.split() == sorted(given, key=int)
    assert any(sorted(p.answer.split()) != p.answer.split() for p in drawn)


def test_boolean_logic_is_pythons():
    # On whole numbers, whose last bit is the value: ~ binds as ! does.
    python = str.maketrans("TF!", "10~")
    drawn = problems("boolean_logic", 200, operators=4, expressions=2)
    for problem in drawn:
        for text, answer in zip(problem.prompt[:-1].split(","), problem.answer, strict=True):
            assert len(re.findall("[&|^]", text)) == 4
            assert "FT"[eval(text.translate(python)) & 1] == answer, text
    answers = "".join(problem.answer for problem in drawn)
    assert 0.35 < answers.count("T") / len(answers) < 0.65


@pytest.mark.parametrize(("length", "kinds"), [(1, 1), (2, 1), (6, 2), (13, 4)])
def test_brackets_close_to_a_dyck_word(length, kinds):
    for problem in problems("brackets", length=length, kinds=kinds):
        prefix = problem.prompt.removeprefix("close ").removesuffix("=")
        assert len(prefix) == length and set(prefix) <= set("()[]{}<>"[: 2 * kinds])
        word = prefix + problem.answer
        while (shorter := re.sub(r"\(\)|\[\]|\{\}|<>", "", word)) != word:
            word = shorter
        assert not word and problem.answer and not set(problem.answer) & set("([{<")


@pytest.mark.parametrize("blanks", [1, 4, 8, 11])
def test_a_sudoku_has_one_solution(blanks):
    for problem in problems("sudoku", 20, blanks=blanks):
        cells = problem.prompt.removeprefix("fill ").removesuffix("=").replace(" ", "")
        assert len(cells) == 16 and cells.count(".") == blanks == len(problem.answer)
        assert solutions(cells) == [problem.answer]


def solutions(cells: str) -> list[str]:
    """Every right answer, by trying digits cell by cell."""
    if "." not in cells:
        return [""]
    place = cells.index(".")
    row, column = divmod(place, 4)
    seen = {
        cells[4 * r + c]
        for r, c in product(range(4), range(4))
        if r == row or c == column or (r // 2, c // 2) == (row // 2, column // 2)
    }
    return [
        digit + rest
        for digit in "1234"
        if digit not in seen
        for rest in solutions(cells[:place] + digit + cells[place + 1 :])
    ]


def test_sudokus_are_drawn_from_all_grids():
    drawn = problems("sudoku", 600, blanks=1)
    grids = {problem.prompt.replace(".", problem.answer) for problem in drawn}
    assert len(grids) > 230  # of the 288, which 600 draws cannot all meet
