"""Scores against log-probabilities worked out from the model's logits by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_m1.errors import InputError
from megatron_m1.inference.scoring import Ids, read_tokens, score, write_scores
from megatron_m1.model.build import forward_row
from parallel.layout import Layout
from parallel.packing import PackedRow
from tests.distributed import Pool
from tests.inference.trained import LAYOUTS, load_into

# Five rows: no layout below divides them evenly, and one row is too short to score.
ROWS: list[Ids] = [
    np.random.RandomState(length).randint(64, size=length) for length in (17, 3, 1, 30, 9)
]


def scored(layout: Layout, checkpoint: Path, micro_batch: int) -> NDArray[np.float32]:
    return score(load_into(layout, checkpoint), layout, ROWS, micro_batch)


def by_hand(checkpoint: Path) -> NDArray[np.float32]:
    """One row at a time, from the logits."""
    (chunk,) = load_into(Layout(), checkpoint).chunks
    chunk.eval()
    expected = np.full((len(ROWS), 29), np.nan, dtype=np.float32)
    for index, row in enumerate(ROWS):
        ids = torch.from_numpy(row)
        with torch.no_grad():
            logits = forward_row(chunk, PackedRow.from_documents([ids]), with_loss=False)[0]
        table = logits.double().log_softmax(-1)
        for place in range(len(row) - 1):
            expected[index, place] = table[place, ids[place + 1]]
    return expected


@pytest.fixture(scope="module")
def expected(ranks: Callable[[int], Pool], checkpoint: Path) -> NDArray[np.float32]:
    (values,) = ranks(1).run(by_hand, checkpoint)
    return values


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_scores_are_log_probabilities(
    name: str,
    micro_batch: int,
    ranks: Callable[[int], Pool],
    checkpoint: Path,
    expected: NDArray[np.float32],
) -> None:
    size, layout = LAYOUTS[name]
    for scores in ranks(size).run(scored, layout, checkpoint, micro_batch):
        np.testing.assert_allclose(scores, expected, atol=1e-5, equal_nan=True)


def one_id_too_large(checkpoint: Path) -> str:
    with pytest.raises(InputError) as refused:
        score(load_into(Layout(), checkpoint), Layout(), [*ROWS, np.array([3, 64])], 1)
    return str(refused.value)


def test_ids_outside_the_vocabulary(ranks: Callable[[int], Pool], checkpoint: Path) -> None:
    (sentence,) = ranks(1).run(one_id_too_large, checkpoint)
    assert sentence == "row 5 has ids outside the vocabulary 0..63"


def test_rows_of_an_array(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(6, dtype=np.uint16).reshape(2, 3))
    rows = read_tokens(str(path))
    assert [(row.tolist(), row.dtype) for row in rows] == [
        ([0, 1, 2], np.int64),
        ([3, 4, 5], np.int64),
    ]


def test_rows_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "ids.jsonl"
    path.write_text('[1, 2]\n{"tokens": [3], "id": 7}\n[]\n')
    assert [row.tolist() for row in read_tokens(str(path))] == [[1, 2], [3], []]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", "", "has no row of two tokens or more"),
        ("a.jsonl", "[1]\n[2]\n", "has no row of two tokens or more"),
        ("a.jsonl", "[1, 2]\n[1, 2.5]\n", "line 2 is neither a list of ids nor"),
        ("a.jsonl", '{"text": "x"}\n', "line 1 is neither a list of ids nor"),
        ("a.jsonl", "[1, 2\n", "cannot be read: Expecting"),
        ("a.npy", "no array", "cannot be read: "),
        ("a.npy", np.zeros((2, 3)), "it holds float64 (2, 3), not ids of [rows, tokens]"),
        ("a.npy", np.zeros(3, int), "it holds int64 (3,), not ids of [rows, tokens]"),
        ("a.npy", np.zeros((0, 3), int), "has no row of two tokens or more"),
        ("a.npy", np.array([[1, None]]), "cannot be read: Object arrays"),
        ("missing.npy", None, "No such file or directory"),
    ],
)
def test_what_is_no_file_of_ids(
    name: str, content: str | NDArray[np.generic] | None, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(InputError) as refused:
        read_tokens(str(path))
    assert str(refused.value).startswith(f"tokens={path} ")
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)


def test_scores_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    scores = np.array([[0.5, np.nan]], dtype=np.float32)
    write_scores(scores, str(tmp_path / "out.npy"))
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), scores)
    (tmp_path / "taken.npy").mkdir()
    with pytest.raises(InputError, match="out=.*taken.npy cannot be written"):
        write_scores(scores, str(tmp_path / "taken.npy"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npy", "taken.npy"]
