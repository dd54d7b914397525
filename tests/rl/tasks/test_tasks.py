"""What holds for every task; the rules of each are in files of their own."""

from __future__ import annotations

import json
import string
from random import Random

import pytest

from megatron_m1.rl.tasks import TASKS, compute_score, final_answer, make_task

EVERY = pytest.mark.parametrize("name", TASKS)
JUNK = ["", " ", "#", "##", "=", "\0", "٣", "²", "T" * 10_000, "(" * 10_000, "1" * 10_000, "1/0"]
# A change of these changes every stream that somebody resumes.
FIRST = {
    "arithmetic": ("44+8=", "52"),
    "sorting": ("sort 5 4 8=", "4 5 8"),
    "boolean_logic": ("(F&!F)&T=", "F"),
    "countdown": ("make 11:2 9 1=", "1*(2+9)"),
    "brackets": ("close []([((=", "))])"),
    "sudoku": ("fill .241 1423 .134 .31.=", "3242"),
}


@EVERY
@pytest.mark.parametrize("difficulty", [None, 0, 1, 4])
def test_reference_answers_are_right_and_ground_truths_are_json(name, difficulty):
    task, random = make_task(name, difficulty), Random(0)
    for _ in range(50):
        problem = task.problem(random)
        truth = json.loads(json.dumps(problem.ground_truth))
        assert problem.prompt.isascii() and problem.prompt.endswith("=") and problem.answer
        assert compute_score(name, problem.answer, truth) == 1.0
        assert compute_score(name, f"so 1#2\n# {problem.answer} \n", truth) == 1.0


@EVERY
def test_other_answers_are_wrong(name):
    task, random = make_task(name), Random(1)
    for _ in range(50):
        problem = task.problem(random)
        place = random.randrange(len(problem.answer))
        for wrong in (
            problem.answer[:place] + problem.answer[place + 1 :],
            f"{problem.answer}#",
            f"{problem.answer}\n{problem.answer}",
            f"{problem.answer}.",
            f"'{problem.answer}'",
            f"#{problem.answer}#1 2 3 T F",
        ):
            assert compute_score(name, wrong, problem.ground_truth) == 0.0, wrong


@EVERY
def test_a_verifier_never_raises_for_an_answer(name):
    random = Random(2)
    truth = make_task(name).problem(random).ground_truth
    noise = ["".join(random.choices(string.printable, k=20)) for _ in range(500)]
    near = ["".join(random.choices("0123456789+-*/() TF", k=9)) for _ in range(2000)]
    for answer in JUNK + noise:
        assert compute_score(name, answer, truth) == 0.0, answer
    for answer in near:
        compute_score(name, answer, truth)


@EVERY
def test_problems_depend_on_the_seed_alone(name):
    drawn = [[make_task(name).problem(Random(seed)) for seed in (5, 6, 7, 8)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert len({problem.prompt for problem in drawn[0]}) > 1


@EVERY
def test_the_stream_of_a_seed_never_changes(name):
    problem = make_task(name).problem(Random("5"))
    assert (problem.prompt, problem.answer) == FIRST[name]


@EVERY
def test_prompts_get_longer_or_harder_with_difficulty(name):
    def size(difficulty: int) -> int:
        random, task = Random(3), make_task(name, difficulty)
        problems = [task.problem(random) for _ in range(100)]
        return sum(len(problem.prompt) + 2 * len(problem.answer) for problem in problems)

    assert size(0) < size(2) < size(4)


def test_the_answer_is_what_follows_the_last_mark():
    assert final_answer("19") == "19"
    assert final_answer(" 12+7=19\n") == "12+7=19"
    assert final_answer("2+7=9, carry 0#1#19") == "19"
    assert final_answer("19#") == ""


def test_what_is_refused():
    with pytest.raises(ValueError, match="there is no task 'algebra'; there are arithmetic, sort"):
        make_task("algebra")
    with pytest.raises(ValueError, match="there is no task 'algebra'"):
        compute_score("algebra", "1", "1")
    with pytest.raises(ValueError, match="sorting has no knob 'size'; it has count, digits"):
        make_task("sorting", size=3)
    with pytest.raises(ValueError, match="sorting: count is 1; give a whole number from 2 to 64"):
        make_task("sorting", count=1)
    with pytest.raises(ValueError, match="arithmetic: digits is 2.5; give a whole number"):
        make_task("arithmetic", digits=2.5)
    with pytest.raises(ValueError, match="arithmetic: operators is '/'; give some of"):
        make_task("arithmetic", operators="/")
    with pytest.raises(ValueError, match="countdown: largest_target is 5"):
        make_task("countdown", largest=9, largest_target=5)


def test_knobs_override_the_difficulty():
    assert make_task("sorting", 3, digits=2) == make_task("sorting", count=5, digits=2)
    with pytest.raises(ValueError, match="sudoku: blanks is 12"):
        make_task("sudoku", 11)
