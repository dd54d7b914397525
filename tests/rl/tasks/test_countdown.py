from __future__ import annotations

from random import Random

import pytest

from megatron_m1.rl.tasks import compute_score, make_task

TRUTH = {"target": 24, "numbers": [3, 5, 9, 9]}


def right(answer: str, target: int = 24, numbers: tuple[int, ...] = (3, 5, 9)) -> bool:
    return bool(compute_score("countdown", answer, {"target": target, "numbers": list(numbers)}))


@pytest.mark.parametrize(
    "answer", ["3*5+9", "5*3+9", "9+3*5", "(9+(3*5))", "9 + 5 * 3", "((9))+5*3"]
)
def test_every_right_expression_is_right(answer):
    assert right(answer)


def test_signs_bind_and_associate_as_usual():
    assert right("9-5-3", target=1) and right("9-(5-3)", target=7)
    assert right("8/4/2", 1, (8, 4, 2)) and right("8/(4/2)", 4, (8, 4, 2))
    assert right("2+3*4", 14, (2, 3, 4)) and not right("2+3*4", 20, (2, 3, 4))


def test_fractions_on_the_way_are_exact():
    assert right("8/(3-8/3)", 24, (8, 3, 8, 3))
    assert right("(1/3+5/3)*3", 6, (1, 3, 5, 3, 3))


@pytest.mark.parametrize(
    "answer",
    [
        *("3*5+8", "24", "3*5", "3*5+9+0", "3*5+9+9", "35+9", "3*5+9=24"),
        *("3*5+9)", "(3*5+9", "3*5 9", "*3*5+9", "3**5+9", "3*5+09", "-3*-5+9", "3*5+9-"),
        *("()3*5+9", "3(5)+9", "3*5+9;", "3×5+9", "3*5+9.0", "９+3*5", "3*(5+)9", "9+3*5()"),
    ],
)
def test_what_is_not_an_expression_of_the_numbers_is_wrong(answer):
    assert not right(answer)


def test_division_by_zero_is_wrong():
    assert not right("9/(3-3)", 24, (9, 3, 3))


def test_deep_parentheses_are_refused_without_a_deep_stack():
    assert not right("(" * 5000 + "3*5+9" + ")" * 5000)


def test_every_number_must_be_used_once():
    assert compute_score("countdown", "(3+5)*(9/9)", TRUTH) == 0.0
    assert compute_score("countdown", "(9-9)*3+24", TRUTH) == 0.0
    assert compute_score("countdown", "9+9+3*5", {**TRUTH, "target": 33}) == 1.0
    assert compute_score("countdown", "9+3*5", {**TRUTH, "target": 24}) == 0.0


@pytest.mark.parametrize(
    "knobs",
    [
        {"operators": "-", "largest": 1},
        {"operators": "+", "numbers": 8, "largest": 5, "largest_target": 7},
    ],
)
def test_knobs_that_make_no_problem_are_refused(knobs):
    with pytest.raises(ValueError, match="makes no problem; give more operators"):
        make_task("countdown", **knobs)


@pytest.mark.parametrize("operators", ["+", "*", "*/", "+-*/"])
def test_problems_keep_to_their_knobs(operators):
    task = make_task(
        "countdown",
        numbers=4,
        largest=20,
        largest_target=50 if operators != "*" else 10**6,
        operators=operators,
    )
    for seed in range(30):
        problem = task.problem(Random(seed))
        truth = problem.ground_truth
        assert right(problem.answer, truth["target"], truth["numbers"])
        assert 1 <= truth["target"] <= task.largest_target and len(truth["numbers"]) == 4
        assert all(1 <= number <= 20 for number in truth["numbers"])
        assert set(problem.answer) <= set("0123456789()") | set(operators)
        assert problem.prompt == f"make {truth['target']}:{' '.join(map(str, truth['numbers']))}="
        # Parentheses stand only where they change the value.
        if operators in ("+", "*"):
            assert "(" not in problem.answer
