"""Streams of prompts without end: from tasks that make them, from files, and blends of both.

A position gives the same prompt whenever it is asked for, so a stream resumes from a number alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Protocol

import numpy as np

from megatron_m1.data.blend import Blend
from megatron_m1.data.chat_template import ChatTemplate
from megatron_m1.errors import InputError
from megatron_m1.rl.prompt_files import VERL, Keys, PromptRow, read_rows
from megatron_m1.rl.samples import Prompt
from megatron_m1.rl.tasks import Task


class Prompts(Protocol):
    """A stream of prompts."""

    @property
    def fingerprint(self) -> str:
        """Changes when the stream does: positions of one mean nothing in another."""
        ...

    @property
    def data_sources(self) -> set[str]:
        """All that its prompts may have."""
        ...

    def prompt(self, position: int) -> Prompt:
        """The prompt at a position, from 0, which is its id."""
        ...


class TaskPrompts:
    """Problems of one task. ``extra_info["answer"]`` is a right answer, to teach with."""

    def __init__(self, task: Task, seed: int) -> None:
        self._task, self._seed = task, seed

    @property
    def fingerprint(self) -> str:
        return _digest(repr(self._task), str(self._seed))

    @property
    def data_sources(self) -> set[str]:
        return {self._task.name}

    def prompt(self, position: int) -> Prompt:
        name = self._task.name
        # A text seeds through its hash, the same in every version of Python.
        problem = self._task.problem(Random(f"{self._seed} {name} {position}"))
        answer = {"answer": problem.answer}
        return Prompt(position, name, problem.prompt, problem.ground_truth, answer)


class FilePrompts:
    """Rows of files, each once an epoch, every epoch in an order of its own.

    Args:
        paths: .parquet and .jsonl files.
        keys: where their rows keep what.
        chat_template: needed where prompts are conversations.

    Raises:
        InputError: a file that is missing, damaged or empty, a row that lacks a key, or a
            conversation without a template.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        seed: int,
        keys: Keys = VERL,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self._rows: list[PromptRow] = []
        for path in paths:
            rows = read_rows(path, keys)
            if chat_template is None and any(not isinstance(row.prompt, str) for row in rows):
                raise InputError(
                    f"{path} holds conversations, and the tokenizer has no chat template: give one "
                    "that has, or prompts as texts"
                )
            self._rows += rows
        self._seed, self._chat_template = seed, chat_template
        self._contents = [_digest_of_file(path) for path in paths]
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        return _digest(*self._contents, str(self._seed))

    @property
    def data_sources(self) -> set[str]:
        return {row.data_source for row in self._rows}

    def prompt(self, position: int) -> Prompt:
        epoch, place = divmod(position, len(self._rows))
        row = self._rows[self._order(epoch)[place]]
        return Prompt(position, row.data_source, self._text(row), row.ground_truth, row.extra_info)

    def _text(self, row: PromptRow) -> str:
        if isinstance(row.prompt, str):
            return row.prompt
        assert self._chat_template is not None  # checked when the files were read
        return self._chat_template(row.prompt)

    def _shuffled(self, epoch: int) -> list[int]:
        # RandomState's stream is frozen: a run resumed under a newer NumPy sees the same order.
        random = np.random.RandomState([self._seed % 2**32, epoch])
        return random.permutation(len(self._rows)).tolist()


class BlendedPrompts:
    """Streams dealt so that each is always within one prompt of its share.

    Raises ValueError unless every stream has a weight, a positive and finite number.
    """

    def __init__(self, streams: Sequence[Prompts], weights: Sequence[float]) -> None:
        if len(streams) != len(weights):
            raise ValueError(f"{len(streams)} streams of prompts have {len(weights)} weights")
        self._streams, self._weights = list(streams), list(weights)
        self._blend = Blend(weights)

    @property
    def fingerprint(self) -> str:
        return _digest(*(stream.fingerprint for stream in self._streams), repr(self._weights))

    @property
    def data_sources(self) -> set[str]:
        return set().union(*(stream.data_sources for stream in self._streams))

    def prompt(self, position: int) -> Prompt:
        stream, within = self._blend.locate(position)
        return replace(self._streams[stream].prompt(within), id=position)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _digest_of_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
