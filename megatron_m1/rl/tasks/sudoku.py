"""``fill 1.34 3412 21.3 4321=`` -> ``24``: the missing digits of a 4x4 sudoku, in reading order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from random import Random
from typing import ClassVar

from megatron_m1.rl.tasks.task import ExactAnswer, Problem, check_knob

_BLANK = "."
Grid = tuple[str, ...]


@dataclass(frozen=True)
class Sudoku(ExactAnswer):
    """Each row, column and 2x2 box holds 1, 2, 3 and 4; a problem has one solution.

    Attributes:
        blanks: cells to fill.
    """

    blanks: int = 4
    name: ClassVar[str] = "sudoku"

    def __post_init__(self) -> None:
        # Four clues may suffice, but grids and cells drawn at random seldom get there.
        check_knob(self.name, "blanks", self.blanks, 1, 11)

    @classmethod
    def at(cls, difficulty: int) -> Sudoku:
        """``difficulty`` + 1 cells."""
        return cls(blanks=difficulty + 1)

    def problem(self, random: Random) -> Problem:
        blanks: list[int] = []
        while len(blanks) < self.blanks:
            grid = random.choice(_grids())
            blanks = _removable(grid, random.sample(range(16), 16), self.blanks)
        cells = [_BLANK if cell in blanks else digit for cell, digit in enumerate("".join(grid))]
        rows = ["".join(cells[start : start + 4]) for start in range(0, 16, 4)]
        answer = "".join("".join(grid)[cell] for cell in sorted(blanks))
        return Problem(f"fill {' '.join(rows)}=", answer, answer)


@cache
def _grids() -> tuple[Grid, ...]:
    """All 288 solutions."""
    rows = ["".join(digits) for digits in permutations("1234")]

    def extended(grid: Grid) -> list[Grid]:
        return [(*grid, row) for row in rows if _fits(grid, row)]

    grids: list[Grid] = [()]
    for _ in range(4):
        grids = [longer for grid in grids for longer in extended(grid)]
    return tuple(grids)


def _fits(grid: Grid, row: str) -> bool:
    """Whether a row can stand below those of a grid."""
    if any(above[column] == row[column] for above in grid for column in range(4)):
        return False
    completes_boxes = len(grid) % 2 == 1
    return not completes_boxes or not (set(grid[-1][:2]) & set(row[:2]))


def _removable(grid: Grid, order: Sequence[int], wanted: int) -> list[int]:
    """Cells to blank, tried in an order, that leave the grid the only solution; at most so many."""
    digits = "".join(grid)
    others = ["".join(other) for other in _grids() if other != grid]
    blanks: list[int] = []
    for cell in order:
        kept = [c for c in range(16) if c != cell and c not in blanks]
        if all(any(other[c] != digits[c] for c in kept) for other in others):
            blanks.append(cell)
        if len(blanks) == wanted:
            break
    return blanks
