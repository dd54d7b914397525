from __future__ import annotations

from collections.abc import Iterator

import pytest

from parallel import host

host.enable()

from megatron.core import tensor_parallel  # noqa: E402

from megatron_m1.runtime import processes  # noqa: E402
from parallel.layout import Layout  # noqa: E402


@pytest.fixture(scope="package")
def single_process() -> Iterator[Layout]:
    """Megatron's groups with one process in each, left again after this folder's tests."""
    layout = Layout()
    with processes(layout):
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        yield layout
