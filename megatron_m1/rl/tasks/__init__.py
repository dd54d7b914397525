"""Tasks whose problems are generated and whose answers are checked by a program: nothing is
downloaded, and nothing that a model writes is executed.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from megatron_m1.rl.tasks.arithmetic import Arithmetic
from megatron_m1.rl.tasks.boolean_logic import BooleanLogic
from megatron_m1.rl.tasks.brackets import Brackets
from megatron_m1.rl.tasks.countdown import Countdown
from megatron_m1.rl.tasks.sorting import Sorting
from megatron_m1.rl.tasks.sudoku import Sudoku
from megatron_m1.rl.tasks.task import Problem, Task, final_answer

__all__ = ["TASKS", "Problem", "Task", "compute_score", "final_answer", "make_task"]

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Arithmetic, Sorting, BooleanLogic, Countdown, Brackets, Sudoku)
}


def make_task(name: str, difficulty: int | None = None, **knobs: Any) -> Task:
    """The task of a name, its knobs set for a step of difficulty (from 0), or their defaults, and
    then one by one.

    Raises:
        ValueError: a task or knob that there is not, or a knob out of its range.
    """
    family = _task(name)
    task: Any = family() if difficulty is None else family.at(difficulty)
    known = [knob.name for knob in fields(task)]
    for knob in knobs:
        if knob not in known:
            raise ValueError(f"{name} has no knob {knob!r}; it has {', '.join(known)}")
    return replace(task, **knobs)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
) -> float:
    """1.0 when the answer in a response is right, else 0.0, with verl's signature.

    Args:
        data_source: name of the task.
        solution_str: the response, without its stop token.
        ground_truth: the problem's.

    Raises:
        ValueError: a task that there is not.
    """
    return float(_task(data_source).is_right(final_answer(solution_str), ground_truth))


def _task(name: str) -> type[Task]:
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]
