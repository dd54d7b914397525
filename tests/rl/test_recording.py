"""What a step has paid for, on a disk that may be full."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_m1.errors import StorageError
from megatron_m1.rl.journal import step_file
from megatron_m1.rl.recording import Record, alone
from megatron_m1.rl.samples import Response
from tests.rl.drawing import Numbers, judge


@contextmanager
def no_room_beyond(size: int) -> Iterator[None]:
    """No file of this process may grow beyond a size, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    response = Response(0, 0, [1], [-1.0], [-1.0], [0], "stop")
    with (
        Record(tmp_path, 1, "fingerprint", judge, alone) as record,
        no_room_beyond(step_file(tmp_path, 1).stat().st_size),
        pytest.raises(StorageError, match=f"responses cannot be kept in {tmp_path}: "),
    ):
        record.add_response(Numbers().prompt(0), response)
