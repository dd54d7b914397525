"""The gated RMSNorm against its formula in float64."""

import pytest
import torch
from torch import Tensor

from kernels.gated_norm import gated_rms_norm, sum_of_squares
from tests.kernels.compare import outputs_and_gradients, relative_error

EPS = 1e-6
NAMES = ("y", "dx", "dgate", "dweight", "dmean_square")


def make_inputs(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    x, gate = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
    weight = 1 + torch.randn(shape[-1], dtype=torch.float64).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    mean_square = 0.1 + torch.rand(*shape[:-1], 1, dtype=torch.float64).to(wide)
    return [x, gate, weight, mean_square]


def run(inputs: list[Tensor], backend: str) -> dict[str, Tensor]:
    outputs, gradients = outputs_and_gradients(
        lambda *x: gated_rms_norm(*x, eps=EPS, backend=backend), inputs
    )
    return dict(zip(NAMES, outputs + gradients, strict=True))


SHAPES = [(12,), (5, 1), (7, 12), (3, 5, 12), (0, 12), (2, 0, 12)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_portable_matches_the_formula(shape: tuple[int, ...]) -> None:
    inputs = make_inputs(*shape)
    expected = run(inputs, "reference")
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        actual = run([x.to(dtype) for x in inputs], "portable")
        for name in NAMES:
            assert relative_error(actual[name], expected[name]) < bound, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    inputs = make_inputs(9, 64, dtype=dtype)
    expected = run([x.double() for x in inputs], "reference")
    actual = run(inputs, "portable")
    bound = 4e-3 if dtype == torch.bfloat16 else 5e-4
    for name in NAMES:
        assert relative_error(actual[name], expected[name]) < bound, name
    dtypes = [actual[name].dtype for name in NAMES]
    assert dtypes == [dtype, dtype, dtype, dtype, torch.float32]


def test_float32_weight_with_bfloat16_channels() -> None:
    inputs = make_inputs(9, 64, dtype=torch.bfloat16)
    inputs[2] = inputs[2].float()
    actual = run(inputs, "portable")
    assert actual["y"].dtype == torch.bfloat16 and actual["dweight"].dtype == torch.float32
    expected = run([x.double() for x in inputs], "reference")
    assert relative_error(actual["dweight"], expected["dweight"]) < 4e-3


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_gradcheck_with_the_mean_square_of_x(backend: str) -> None:
    def whole_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        mean_square = sum_of_squares(x, backend=backend) / x.shape[-1]
        return gated_rms_norm(x, gate, weight, mean_square, eps=EPS, backend=backend)

    inputs = [x.requires_grad_() for x in make_inputs(2, 3, 5)[:3]]
    assert torch.autograd.gradcheck(whole_norm, inputs)


def test_shares_of_the_channels_make_the_whole_norm() -> None:
    """What tensor parallelism does: the sums of squares are added, the rest is local."""

    def sharded(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        shares = [[part.chunk(2, dim=-1)[rank] for part in (x, gate, weight)] for rank in range(2)]
        mean_square = sum(sum_of_squares(share[0]) for share in shares) / x.shape[-1]
        return torch.cat([gated_rms_norm(*s, mean_square, eps=EPS) for s in shares], dim=-1)

    def whole(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        normed = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, EPS)
        return normed * torch.sigmoid(gate)

    inputs = make_inputs(4, 6, 10)[:3]
    expected = sum(outputs_and_gradients(whole, inputs), [])
    for actual, truth in zip(
        sum(outputs_and_gradients(sharded, inputs), []), expected, strict=True
    ):
        assert relative_error(actual, truth) < 1e-14


def test_strided_arguments_and_gradients() -> None:
    x, gate = torch.randn(2, 5, 7, 12, dtype=torch.float64).transpose(1, 2)
    _, _, weight, mean_square = make_inputs(7, 5, 12)
    inputs = [t.requires_grad_() for t in (x, gate, weight, mean_square)]
    gradients = [
        torch.autograd.grad(gated_rms_norm(*inputs, eps=EPS, backend=backend).sum(), inputs)
        for backend in ("portable", "reference")
    ]
    for actual, expected in zip(*gradients, strict=True):
        assert relative_error(actual, expected) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_of_squares(dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, 100).to(dtype)
    (actual,), (dx,) = outputs_and_gradients(sum_of_squares, [x])
    (expected,), (dx_expected,) = outputs_and_gradients(
        lambda x: sum_of_squares(x, backend="reference"), [x.double()]
    )
    assert actual.shape == (3, 4, 1) and actual.dtype == torch.float32 and dx.dtype == dtype
    assert relative_error(actual, expected) < 1e-6
    assert relative_error(dx, dx_expected) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_rows_of_zeros_have_a_gradient() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    y = gated_rms_norm(x, torch.zeros(2, 4), torch.ones(4), sum_of_squares(x) / 4, eps=EPS)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(dx, torch.full_like(dx, 0.5 * EPS**-0.5))


def test_equal_inputs_give_equal_bits() -> None:
    inputs = make_inputs(50, 96, dtype=torch.float32)
    first, second = (run(inputs, "portable") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_saves_nothing_but_its_inputs() -> None:
    inputs = [x.requires_grad_() for x in make_inputs(3, 8)]
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.data_ptr()) or x, lambda x: x
    ):
        gated_rms_norm(*inputs, eps=EPS)
        sum_of_squares(inputs[0])
    assert set(saved) == {x.data_ptr() for x in inputs}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "magic"}, "auto, portable, reference, got 'magic'"),
        ({"x": torch.zeros(2, 4, dtype=torch.int32)}, "x must be floating point"),
        ({"gate": torch.zeros(2, 5)}, r"gate must be \[..., W\]"),
        ({"weight": torch.zeros(5)}, r"weight \[W\]"),
        ({"mean_square": torch.zeros(2)}, r"of shape \[2, 1\], got torch.float32 of shape \[2\]"),
        ({"mean_square": torch.zeros(2, 1).bfloat16()}, "mean_square must be torch.float32"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
    ],
)
def test_bad_input(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "x": torch.zeros(2, 4),
        "gate": torch.zeros(2, 4),
        "weight": torch.zeros(4),
        "mean_square": torch.ones(2, 1),
        "eps": EPS,
    }
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(**arguments | changes)


def test_sum_of_squares_wants_channels() -> None:
    with pytest.raises(ValueError, match="floating point"):
        sum_of_squares(torch.tensor(1.0))
    with pytest.raises(ValueError, match="auto, portable, reference"):
        sum_of_squares(torch.ones(2), backend="magic")
