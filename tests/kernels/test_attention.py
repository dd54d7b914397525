"""Packed attention against whole score matrices in float64. Every comparison is per head."""

from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kernels.attention import blockwise, cpu_flash, portable, varlen_attention
from tests.kernels.compare import outputs_and_gradients, relative_error

H, D = 4, 8
HEAD = {"out": 1, "lse": 0, "dq": 1, "dk": 1, "dv": 1}
PACKED = [
    [0, 0],
    [0, 1],
    [0, 1, 2, 3],
    [0, 0, 0, 7, 14, 21, 21],
    [0, 50, 50, 51, 200],
    [0, blockwise.BLOCK, 2 * blockwise.BLOCK, 4 * blockwise.BLOCK + 1],
]


@pytest.fixture(params=[cpu_flash, blockwise], ids=["cpu_flash", "blockwise"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Both ways of the portable backend; a CPU would only ever take the first."""
    monkeypatch.setattr(portable, "cpu_flash", request.param)
    return request.param


def make_inputs(T: int, K: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(T, heads, D, dtype=torch.float64).to(dtype) for heads in (H, K, K)]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def run(
    inputs: list[Tensor], bounds: list[int], backend: str, scale: float | None = None
) -> dict[str, Tensor]:
    outputs, gradients = outputs_and_gradients(
        lambda *x: varlen_attention(*x, int32(*bounds), scale=scale, backend=backend), inputs
    )
    return dict(zip(HEAD, outputs + gradients, strict=True))


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    for name, tensor in actual.items():
        error = relative_error(tensor, expected[name], HEAD[name])
        assert error <= bound, f"{name}: {error:.1e} > {bound:.0e}"


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("bounds", PACKED, ids=str)
def test_portable_matches_the_formula(bounds: list[int], K: int) -> None:
    inputs = make_inputs(bounds[-1], K)
    expected = run(inputs, bounds, "reference", scale=0.7)
    assert_close(run(inputs, bounds, "portable", scale=0.7), expected, 1e-12)
    assert_close(run([x.float() for x in inputs], bounds, "portable", scale=0.7), expected, 3e-6)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("which", ["out", "lse"])
def test_gradient_through_one_output_alone(which: str) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(60)]
    gradients = []
    for backend in ("portable", "reference"):
        out, lse = varlen_attention(*inputs, int32(0, 20, 60), backend=backend)
        total = out.sum() if which == "out" else lse.sum()
        gradients.append(torch.autograd.grad(total, inputs, allow_unused=True))
    for actual, expected in zip(*gradients, strict=True):
        if expected is None:
            assert not actual.any()
        else:
            assert relative_error(actual, expected, 1) < 1e-12


def test_reference_passes_gradcheck() -> None:
    inputs = [x[..., :2].clone().requires_grad_() for x in make_inputs(4)]
    assert torch.autograd.gradcheck(
        lambda *x: varlen_attention(*x, int32(0, 1, 1, 4), backend="reference"), inputs
    )


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_a_packed_document_is_as_if_alone(backend: str) -> None:
    bounds = [0, 40, 41, 120]
    q, k, v = make_inputs(bounds[-1])
    out, lse = varlen_attention(q, k, v, int32(*bounds), backend=backend)
    for begin, end in pairwise(bounds):
        alone = (x[begin:end] for x in (q, k, v))
        out_alone, lse_alone = varlen_attention(*alone, int32(0, end - begin), backend=backend)
        assert relative_error(out[begin:end], out_alone, 1) < 1e-13
        assert relative_error(lse[:, begin:end], lse_alone, 0) < 1e-13


@pytest.mark.usefixtures("kernel")
def test_any_strides() -> None:
    q, k, v = torch.randn(75, H, 3 * D, dtype=torch.float64).split(D, dim=-1)
    k = k.transpose(0, 1).contiguous().transpose(0, 1)
    v = v.mT.contiguous().mT
    expected = run([x.contiguous() for x in (q, k, v)], [0, 30, 75], "reference")
    assert_close(run([q, k, v], [0, 30, 75], "portable"), expected, 1e-12)


def test_scale_defaults_to_the_root_of_the_width() -> None:
    inputs = make_inputs(9)
    assert_close(
        run(inputs, [0, 9], "portable"), run(inputs, [0, 9], "reference", scale=D**-0.5), 1e-12
    )


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    inputs = make_inputs(150, dtype=dtype)
    actual = run(inputs, [0, 40, 150], "portable")
    assert actual["out"].dtype == actual["dk"].dtype == dtype
    assert actual["lse"].dtype == torch.float32
    expected = run([x.double() for x in inputs], [0, 40, 150], "reference")
    assert_close(actual, expected, 1.2e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.usefixtures("kernel")
def test_large_scores_stay_finite() -> None:
    inputs = make_inputs(40, dtype=torch.float32)
    actual = run(inputs, [0, 40], "portable", scale=1e4)
    assert all(x.isfinite().all() for x in actual.values())


@pytest.mark.usefixtures("kernel")
def test_equal_inputs_give_equal_bits() -> None:
    inputs = make_inputs(300, dtype=torch.float32)
    first, second = (run(inputs, [0, 40, 80, 80, 300], "portable") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("kernel")
def test_memory_saved_for_the_backward_is_linear() -> None:
    saved: list[int] = []
    inputs = [x.requires_grad_() for x in make_inputs(300)]
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.numel()) or x, lambda x: x
    ):
        varlen_attention(*inputs, int32(0, 300))
    assert sum(saved) == sum(x.numel() for x in inputs) + 300 * H * D + 300 * H


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "magic"}, "auto, portable, reference, got 'magic'"),
        ({"q": torch.zeros(1, 6, H, D)}, r"q must be \[T, H, D\]"),
        ({"k": torch.zeros(5, 2, D)}, r"k and v \[T, K, D\]"),
        ({"v": torch.zeros(6, 2, D + 1)}, r"k and v \[T, K, D\]"),
        ({"q": torch.zeros(6, 3, D)}, "multiple of the key/value heads, got 3 and 2"),
        ({"q": torch.zeros(6, H, D).half()}, "share one floating dtype"),
        ({"q": torch.zeros(6, H, D, device="meta")}, "on one device"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "must be int32"),
        ({"cu_seqlens": int32(0, 5)}, "from 0 to the 6 tokens"),
        ({"cu_seqlens": int32(0, 4, 2, 6)}, "must never fall"),
    ],
)
def test_bad_input(changes: dict[str, object], message: str) -> None:
    q, k, v = make_inputs(6, dtype=torch.float32)
    arguments: dict[str, object] = {"q": q, "k": k, "v": v, "cu_seqlens": int32(0, 6)}
    with pytest.raises(ValueError, match=message):
        varlen_attention(**arguments | changes)
