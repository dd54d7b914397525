"""Pools of processes shared by the whole session, and Megatron on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

# Deterministic algorithms, which the tests of kernels ask for, want it of cuBLAS.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if not torch.cuda.is_available():
    # Triton kernels then run on the CPU. Read when Triton is first imported, so before Megatron.
    os.environ["TRITON_INTERPRET"] = "1"

from parallel import host  # noqa: E402
from tests.distributed import Pool  # noqa: E402

host.enable()

from megatron.core import tensor_parallel  # noqa: E402

from megatron_m1.runtime import processes  # noqa: E402
from parallel.layout import Layout  # noqa: E402


@pytest.fixture(scope="package")
def single_process() -> Iterator[Layout]:
    """Megatron's groups with one process in each, left again after the folder's tests."""
    layout = Layout()
    with processes(layout):
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        yield layout


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Pool]]:
    """``ranks(n)`` is a pool of n ranks, started on first use, after a failure and when worn."""
    pools: dict[int, Pool] = {}

    def pool(size: int) -> Pool:
        if size not in pools or not pools[size].usable:
            if size in pools:
                pools[size].close()
            pools[size] = Pool(size)
        return pools[size]

    yield pool
    for started in pools.values():
        started.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if host.has_accelerator():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
