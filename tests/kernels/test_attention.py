"""Packed attention against whole score matrices in float64. Every comparison is per head."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.attention import (
    attention_backward,
    attention_forward,
    blockwise,
    cpu_flash,
    portable,
    varlen_attention,
)
from tests.kernels.attention_cases import (
    BLOCK,
    HEAD,
    PACKED,
    PARTS,
    D,
    H,
    assert_close,
    assert_part_close,
    formula_of_part,
    int32,
    make_inputs,
    run,
    run_part,
    strided,
)
from tests.kernels.compare import relative_error


@pytest.fixture(params=[cpu_flash, blockwise], ids=["cpu_flash", "blockwise"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Both ways of the portable backend; a CPU would only ever take the first."""
    monkeypatch.setattr(portable, "cpu_flash", request.param)
    monkeypatch.setattr(blockwise, "BLOCK", BLOCK)
    monkeypatch.setattr(blockwise, "SCORES", 2 * H * 7 * 7)
    return request.param


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
    inputs = make_inputs(75)
    expected = run(inputs, [0, 30, 75], "reference")
    assert_close(run(strided(inputs), [0, 30, 75], "portable"), expected, 1e-12)


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
    inputs = make_inputs(3 * BLOCK, dtype=torch.float32)
    actual = run(inputs, [0, 3 * BLOCK], "portable", scale=1e4)
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


class LargestTensor(TorchDispatchMode):
    """The most elements that any operator returned."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("documents", [1, 40])
def test_no_tensor_grows_faster_than_the_row(kernel: ModuleType, documents: int) -> None:
    T = 40 * BLOCK
    bounds = list(range(0, T + 1, T // documents))
    with LargestTensor() as largest:
        run(make_inputs(T), bounds, "portable")
    # The gradient of lse takes a channel of its own.
    assert largest.elements <= max(T * H * (D + 1), H * BLOCK**2, blockwise.SCORES)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("K", [1, 4])
@pytest.mark.parametrize("bounds", PARTS, ids=str)
def test_parts_match_the_formula(bounds: tuple[list[int], list[int]], K: int) -> None:
    inputs = make_inputs(bounds[0][-1], K, keys=bounds[1][-1])
    d_out, d_lse = torch.randn_like(inputs[0]), torch.randn(H, bounds[0][-1]).double()
    expected = formula_of_part(inputs, bounds, d_out, d_lse)
    for backend, dtype, bound in (
        ("reference", torch.float64, 1e-12),
        ("portable", torch.float64, 1e-12),
        ("portable", torch.float32, 3e-6),
    ):
        arguments = [x.to(dtype) for x in strided(inputs)]
        actual = run_part(arguments, bounds, backend, d_out.to(dtype), d_lse.to(dtype))
        assert_part_close(actual, expected, bound)


HALVES = [0, 5, 10, 11, 11, 11, 12, 80, 148]
"""First and second halves of four documents, of 10, 1, 1 and 136 tokens; two halves are empty."""
FIRSTS = [slice(*span) for span in list(pairwise(HALVES))[::2]]


def cut_in_two(inputs: Sequence[Tensor], backend: str) -> Iterator[tuple[list[Tensor], dict]]:
    """A causal row in two parts: each half alone, then all second halves against the first."""
    q, k, v = inputs
    common = {"scale": 0.7, "backend": backend}
    yield [q, k, v], {"bounds_q": HALVES, "bounds_k": HALVES, "causal": True, **common}
    k, v = (torch.cat([x[first] for first in FIRSTS]) for x in (k, v))
    # The queries of a first half meet no keys, those of a second half the first half's.
    bounds_k = [0]
    for first in FIRSTS:
        bounds_k += [bounds_k[-1], bounds_k[-1] + first.stop - first.start]
    yield [q, k, v], {"bounds_q": HALVES, "bounds_k": bounds_k, "causal": False, **common}


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 3e-6)]
)
def test_merged_parts_are_the_whole(dtype: torch.dtype, bound: float, backend: str) -> None:
    """What a ring does: partial results merge by their lse, partial gradients add up."""
    inputs = make_inputs(HALVES[-1], dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    weights = torch.randn(HALVES[-1], H, D, dtype=wide)
    leaves = [x.double().requires_grad_() for x in inputs]
    whole_out, whole_lse = varlen_attention(
        *leaves, int32(*HALVES[::2]), scale=0.7, backend="reference"
    )
    expected = torch.autograd.grad((whole_out * weights).sum(), leaves)

    parts = list(cut_in_two(inputs, backend))
    outs, lses = zip(*(attention_forward(*x, **y, out_dtype=wide) for x, y in parts), strict=True)
    lse = torch.logaddexp(*lses)
    out = sum(torch.exp(a - lse).mT[..., None] * o for o, a in zip(outs, lses, strict=True))
    (dq, dk, dv), (dq_late, *d_firsts) = (
        attention_backward(weights, *x, out, lse, **y, grad_dtype=wide) for x, y in parts
    )
    for grad, late in zip((dk, dv), d_firsts, strict=True):
        parts_of_late = late.split([first.stop - first.start for first in FIRSTS])
        for first, part in zip(FIRSTS, parts_of_late, strict=True):
            grad[first] += part
    actual = dict(zip(HEAD, (out, lse, dq + dq_late, dk, dv), strict=True))
    assert_close(actual, dict(zip(HEAD, (whole_out, whole_lse, *expected), strict=True)), bound)


BAD_ROWS = [
    ({"backend": "magic"}, "torch_flash, portable, reference, got 'magic'"),
    ({"backend": "torch_flash"}, "torch_flash cannot run: it takes float16 and bfloat16"),
    ({"q": torch.zeros(1, 6, H, D)}, r"q must be \[T, H, D\]"),
    ({"k": torch.zeros(5, 2, D)}, r"k and v \[T, K, D\]"),
    ({"v": torch.zeros(6, 2, D + 1)}, r"k and v \[T, K, D\]"),
    ({"q": torch.zeros(6, 3, D)}, "multiple of the key/value heads, got 3 and 2"),
    ({"q": torch.zeros(6, H, D).half()}, "share one floating dtype"),
    ({"q": torch.zeros(6, H, D, device="meta")}, "on one device"),
    ({"k": torch.zeros(7, 2, D), "v": torch.zeros(7, 2, D)}, "one number of tokens, got 6 and 7"),
    ({"cu_seqlens": torch.tensor([0, 6])}, "must be int32"),
    ({"cu_seqlens": int32(0, 5)}, "from 0 to the 6 tokens"),
    ({"cu_seqlens": int32(0, 4, 2, 6)}, "must never fall"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ROWS)
def test_bad_input(changes: dict[str, object], message: str) -> None:
    q, k, v = make_inputs(6, dtype=torch.float32)
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "cu_seqlens": int32(0, 6)}
    with pytest.raises(ValueError, match=message):
        varlen_attention(**arguments | changes)


BAD_PARTS = [
    ({"backend": "flash_attention_3"}, "flash_attention_3 cannot run: it takes float16"),
    ({"bounds_q": [0, 6]}, "one length of at least 2, got 2 and 3"),
    ({"bounds_q": [0], "bounds_k": [0]}, "one length of at least 2, got 1 and 1"),
    ({"bounds_q": [0, 7, 6]}, r"bounds_q must start at 0 and never fall, got \[0, 7, 6\]"),
    ({"bounds_k": [1, 4, 9]}, "bounds_k must start at 0"),
    ({"bounds_k": [0, 4, 8]}, "at the 9 keys, got 6 and 8"),
    ({"causal": True}, "causal segments must have as many queries as keys"),
    ({"out": torch.zeros(6, H, D + 1)}, r"out must be floating point of shape \[6, 4, 8\]"),
    ({"d_out": torch.zeros(6, H, D).long()}, "d_out must be floating point"),
    ({"lse": torch.zeros(6, H)}, r"lse must be torch.float32 of shape \[4, 6\] on cpu"),
    ({"d_lse": torch.zeros(H, 6).half()}, "d_lse must be torch.float32"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_PARTS)
def test_bad_part(changes: dict[str, object], message: str) -> None:
    q, k, v = make_inputs(6, dtype=torch.float32, keys=9)
    arguments: dict[str, Any] = {"d_out": q, "q": q, "k": k, "v": v, "out": q}
    arguments |= {"lse": torch.zeros(H, 6), "bounds_q": [0, 2, 6], "bounds_k": [0, 4, 9]}
    with pytest.raises(ValueError, match=message):
        attention_backward(**arguments | {"causal": False, "scale": 1.0} | changes)
