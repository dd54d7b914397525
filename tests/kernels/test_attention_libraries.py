"""FlashAttention libraries: what they are given, on any machine; what they give back, on a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.attention as attention
from kernels.attention import portable, reference
from kernels.attention.flash import FlashBackend
from kernels.attention.flash_libraries import LIBRARIES, Library, Packed
from kernels.attention.segments import Segments
from tests.kernels.attention_cases import (
    PACKED,
    PARTS,
    H,
    assert_close,
    assert_part_close,
    formula_of_part,
    make_inputs,
    run,
    run_part,
    strided,
)
from tests.kernels.compare import relative_error


def stand_in() -> Library:
    """The formula in the place of a FlashAttention library, which refuses what those refuse."""

    def segments(packed: Packed, *tensors: Tensor) -> Segments:
        for x in tensors:
            assert x.dtype == torch.float16 and x.shape[-1] % 8 == 0 and x.stride(-1) == 1
            assert all(stride % 8 == 0 for stride in x.stride()[:-1]) and x.data_ptr() % 16 == 0
        lengths_q, lengths_k = packed.cu_q.diff(), packed.cu_k.diff()
        assert packed.cu_q.dtype == torch.int32 and packed.cu_q.is_contiguous()
        assert lengths_q.min() > 0 and lengths_k.min() > 0
        assert (packed.max_q, packed.max_k) == (lengths_q.max(), lengths_k.max())
        return Segments(packed.cu_q.tolist(), packed.cu_k.tolist(), packed.causal)

    def forward(q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float) -> Any:
        return reference.forward(q, k, v, segments(packed, q, k, v), scale, q.dtype)

    def backward(
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        packed: Packed,
        scale: float,
    ) -> Any:
        plan = segments(packed, d_out, q, k, v, out)
        assert lse.is_contiguous() and lse.dtype == torch.float32
        return reference.backward(d_out, q, k, v, out, lse, None, plan, scale, q.dtype)

    return Library(forward, backward, missing=lambda device: None)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a FlashAttention backend that runs without a GPU."""
    for backends in (attention._FLASH, attention._BACKENDS):
        monkeypatch.setitem(backends, "torch_flash", FlashBackend(stand_in()))
    return "torch_flash"


@pytest.mark.parametrize("bounds", PACKED[1:], ids=str)
@pytest.mark.parametrize("width", [3, 8])
def test_a_library_is_given_what_it_can_read(bounds: list[int], width: int, library: str) -> None:
    inputs = make_inputs(bounds[-1], dtype=torch.float16, width=width)
    expected = run([x.double() for x in inputs], bounds, "reference")
    assert_close(run(strided(inputs), bounds, library), expected, 2e-3)


@pytest.mark.parametrize("bounds", PARTS, ids=str)
def test_a_library_never_sees_an_empty_segment(
    bounds: tuple[list[int], list[int]], library: str
) -> None:
    inputs = make_inputs(bounds[0][-1], dtype=torch.float16, keys=bounds[1][-1])
    d_out, d_lse = torch.randn_like(inputs[0]), torch.randn(H, bounds[0][-1])
    expected = formula_of_part(inputs, bounds, d_out.double(), d_lse.double())
    assert_part_close(run_part(inputs, bounds, library, d_out, d_lse), expected, 2e-3)


def test_the_gradient_of_lse_is_not_rounded_to_half_precision(library: str) -> None:
    """Beside a large gradient of lse, that of the output would drown in its rounding."""
    inputs = make_inputs(60, dtype=torch.float16)
    d_out, d_lse = torch.randn_like(inputs[0]), 1e3 * (1 + torch.rand(H, 60))
    bounds = ([0, 60], [0, 60])
    expected = formula_of_part(inputs, bounds, d_out.double(), d_lse.double())
    actual = run_part(inputs, bounds, library, d_out, d_lse)
    assert relative_error(actual["dq"], expected["dq"], 1) < 4e-4


def test_auto_takes_a_library_where_one_runs(library: str) -> None:
    q = make_inputs(4, dtype=torch.float16)[0]
    assert attention._backend("auto", q) is attention._FLASH[library]
    for other in (q.float(), q.new_empty(4, H, 512)):
        assert attention._backend("auto", other) is portable


def test_no_library_claims_a_cpu() -> None:
    reasons = [library.missing(torch.device("cpu")) for library in LIBRARIES.values()]
    assert all(reason and reason.startswith("it needs") for reason in reasons)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("K", [1, 4])
@pytest.mark.parametrize("width", [60, 64, 128])
@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_match_the_formula(
    name: str, width: int, K: int, dtype: torch.dtype, deterministic: bool
) -> None:
    if reason := LIBRARIES[name].missing(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip(f"{name}: {reason}")
    torch.use_deterministic_algorithms(deterministic)
    bound = 1e-2 if dtype == torch.bfloat16 else 2e-3
    for bounds in (*PACKED[1:], [0, 1000, 1001, 3000]):
        inputs = make_inputs(bounds[-1], K, dtype, width=width)
        expected = run([x.double() for x in inputs], bounds, "reference")
        assert_close(run(inputs, bounds, name, device="cuda"), expected, bound)
    for part in PARTS:
        inputs = make_inputs(part[0][-1], K, dtype, keys=part[1][-1], width=width)
        d_out, d_lse = torch.randn_like(inputs[0]), torch.randn(H, part[0][-1])
        expected = formula_of_part(inputs, part, d_out.double(), d_lse.double())
        assert_part_close(run_part(inputs, part, name, d_out, d_lse, "cuda"), expected, bound)
