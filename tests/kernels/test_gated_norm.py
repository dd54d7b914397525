"""The gated RMSNorm against its formula in float64; the Triton kernels on a GPU or interpreted."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.gated_norm as gated_norm
from kernels.gated_norm import gated_rms_norm, sum_of_squares
from parallel import host
from tests.kernels.compare import outputs_and_gradients, relative_error

EPS = 1e-6
NAMES = ("y", "dx", "dgate", "dweight", "dmean_square")
FUSED = pytest.param(
    "fused", marks=pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
)
BACKENDS = ["portable", FUSED]
DEVICE = {"portable": torch.device("cpu"), "fused": host.device()}
# Triton's interpreter cuts to bfloat16 where a card rounds.
ROUNDING = {torch.bfloat16: 8e-3, torch.float16: 5e-4, torch.float32: 1e-6, torch.float64: 1e-14}


def make_inputs(
    *shape: int, dtype: torch.dtype = torch.float64, whole: bool = False
) -> list[Tensor]:
    """x, gate, weight and, unless all channels are here, a mean square."""
    x, gate = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
    weight = 1 + torch.randn(shape[-1], dtype=torch.float64).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    mean_square = 0.1 + torch.rand(*shape[:-1], 1, dtype=torch.float64).to(wide)
    return [x, gate, weight] if whole else [x, gate, weight, mean_square]


def run_on(
    backend: str, function: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients, computed where the backend runs, on the CPU."""
    device = DEVICE.get(backend, "cpu")
    return outputs_and_gradients(lambda *x: function(*(t.to(device) for t in x)).cpu(), inputs)


def run(inputs: list[Tensor], backend: str, eps: float = EPS) -> dict[str, Tensor]:
    outputs, gradients = run_on(
        backend, lambda *x: gated_rms_norm(*x, eps=eps, backend=backend), inputs
    )
    return dict(zip(NAMES, outputs + gradients, strict=False))


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        error = relative_error(tensor, expected[name])
        assert error < bound, f"{name}: {error:.1e} >= {bound:.0e}"


SHAPES = [(12,), (5, 1), (7, 12), (3, 5, 130), (0, 12), (2, 0, 12), (1, 7), (9, 60)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_formula(shape: tuple[int, ...], whole: bool, backend: str) -> None:
    inputs = make_inputs(*shape, whole=whole)
    # With a small eps and one channel, dx would be what two large numbers leave of each other.
    eps = 0.5 if shape[-1] == 1 else EPS
    expected = run(inputs, "reference", eps)
    for dtype in (torch.float64, torch.float32) if backend == "portable" else (torch.float32,):
        actual = run([x.to(dtype) for x in inputs], backend, eps)
        assert_close(actual, expected, ROUNDING[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype, whole: bool, backend: str) -> None:
    inputs = make_inputs(9, 64, dtype=dtype, whole=whole)
    actual = run(inputs, backend)
    assert_close(actual, run([x.double() for x in inputs], "reference"), ROUNDING[dtype])
    dtypes = [x.dtype for x in actual.values()]
    assert dtypes == [dtype] * 4 + ([] if whole else [torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_weight_with_bfloat16_channels(backend: str) -> None:
    inputs = make_inputs(9, 64, dtype=torch.bfloat16)
    inputs[2] = inputs[2].float()
    actual = run(inputs, backend)
    assert actual["y"].dtype == torch.bfloat16 and actual["dweight"].dtype == torch.float32
    expected = run([x.double() for x in inputs], "reference")
    assert relative_error(actual["dweight"], expected["dweight"]) < 4e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_rows_than_programs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of dw over several rows of a program, a number of rows that they do not divide."""
    if backend == "fused":
        import kernels.gated_norm.fused as fused

        monkeypatch.setattr(fused, "PARTIALS", 4 * 32)
    inputs = make_inputs(31, 20, whole=True)
    actual = run([x.float() for x in inputs], backend)
    assert_close(actual, run(inputs, "reference"), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_any_size_whose_square_is_a_float(size: float, backend: str) -> None:
    inputs = make_inputs(5, 12, whole=True)
    inputs[0] *= size
    actual = run([x.float() for x in inputs], backend)
    assert_close(actual, run(inputs, "reference"), 1e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_far_open_and_far_shut(backend: str) -> None:
    inputs = make_inputs(4, 6, whole=True)
    inputs[1] = torch.tensor([-1e4, -90.0, 0.0, 20.0, 90.0, 1e4], dtype=torch.float64).expand(4, 6)
    actual = run([x.float() for x in inputs], backend)
    assert all(x.isfinite().all() for x in actual.values())
    assert_close(actual, run(inputs, "reference"), 1e-6)


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("whole", [False, True])
def test_gradcheck(whole: bool, backend: str) -> None:
    def norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        mean_square = None if whole else sum_of_squares(x, backend=backend) / x.shape[-1]
        return gated_rms_norm(x, gate, weight, mean_square, eps=EPS, backend=backend)

    inputs = [x.requires_grad_() for x in make_inputs(2, 3, 5, whole=True)]
    assert torch.autograd.gradcheck(norm, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shares_of_the_channels_make_the_whole_norm(backend: str) -> None:
    """What tensor parallelism does: the sums of squares are added, the rest is local."""

    def sharded(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        shares = [[part.chunk(2, dim=-1)[rank] for part in (x, gate, weight)] for rank in range(2)]
        squares = [sum_of_squares(share[0], backend=backend) for share in shares]
        mean_square = sum(squares) / x.shape[-1]
        norms = [gated_rms_norm(*s, mean_square, eps=EPS, backend=backend) for s in shares]
        return torch.cat(norms, dim=-1)

    def whole(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        normed = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, EPS)
        return normed * torch.sigmoid(gate)

    inputs = make_inputs(4, 6, 10, whole=True)
    expected = sum(outputs_and_gradients(whole, inputs), [])
    dtype = torch.float64 if backend == "portable" else torch.float32
    actual = sum(run_on(backend, sharded, [x.to(dtype) for x in inputs]), [])
    for found, truth in zip(actual, expected, strict=True):
        assert relative_error(found, truth) < ROUNDING[dtype]


STRIDED = {
    "a slice of a projection": lambda *shape: torch.randn(*shape[:-1], 3 * shape[-1])[
        ..., shape[-1] : 2 * shape[-1]
    ],
    "leading dimensions exchanged": lambda *shape: torch.randn(
        shape[1], shape[0], shape[2]
    ).transpose(0, 1),
    "channels first": lambda *shape: torch.randn(shape[2], shape[0], shape[1]).permute(1, 2, 0),
    "rows repeated": lambda *shape: torch.randn(shape[-1]).expand(shape),
    "every other row": lambda *shape: torch.randn(2 * shape[0], *shape[1:])[::2],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("strides", STRIDED)
def test_strided_arguments_and_gradients(strides: str, whole: bool, backend: str) -> None:
    device = DEVICE[backend]
    x, gate = (STRIDED[strides](3, 5, 12).to(device) for _ in range(2))
    weight = torch.randn(24, device=device)[::2]
    mean_square = 0.1 + torch.rand(5, 3, 1, device=device).transpose(0, 1)
    inputs = [t.requires_grad_() for t in (x, gate, weight, mean_square)[: 3 if whole else 4]]
    # A sum sends back a gradient whose elements are all one in memory.
    gradients = [
        torch.autograd.grad(gated_rms_norm(*inputs, eps=EPS, backend=name).sum(), inputs)
        for name in (backend, "reference")
    ]
    for actual, expected in zip(*gradients, strict=True):
        assert relative_error(actual, expected) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 4, 100), (5, 1), (1, 7), (0, 4), (130,)], ids=str)
def test_sum_of_squares(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    x = torch.randn(*shape, 2).to(dtype)[..., 0]
    (actual,), (dx,) = run_on(backend, lambda x: sum_of_squares(x, backend=backend), [x])
    (expected,), (dx_expected,) = outputs_and_gradients(
        lambda x: sum_of_squares(x, backend="reference"), [x.double()]
    )
    assert actual.shape == (*shape[:-1], 1) and actual.dtype == torch.float32 and dx.dtype == dtype
    assert relative_error(actual, expected) < 1e-6
    assert relative_error(dx, dx_expected) < ROUNDING[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sum_of_squares_takes_any_gradient(backend: str) -> None:
    x = torch.randn(3, 4, 6, device=DEVICE[backend], requires_grad=True)
    for d_sum in (
        torch.randn(4, 3, 1).transpose(0, 1),
        torch.randn(3, 4, 2)[..., :1],
        torch.randn(1, 1, 1).expand(3, 4, 1),
    ):
        d_sum = d_sum.to(DEVICE[backend])
        (dx,) = torch.autograd.grad(sum_of_squares(x, backend=backend), x, d_sum)
        assert torch.allclose(dx, 2 * x * d_sum)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_zeros_have_a_gradient(backend: str) -> None:
    x = torch.zeros(2, 4, device=DEVICE[backend], requires_grad=True)
    gate, weight = torch.zeros_like(x), torch.ones_like(x[0])
    for mean_square in (None, sum_of_squares(x, backend=backend) / 4):
        y = gated_rms_norm(x, gate, weight, mean_square, eps=EPS, backend=backend)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert torch.allclose(dx, torch.full_like(dx, 0.5 * EPS**-0.5))


@pytest.mark.parametrize("backend", [FUSED])
def test_kernels_run_where_their_tensors_are(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which may be another one."""
    guarded, device_of = [], torch.cuda.device_of
    monkeypatch.setattr(
        torch.cuda, "device_of", lambda x: (guarded.append(x.device), device_of(x))[1]
    )
    inputs = make_inputs(2, 8, dtype=torch.float32)
    run(inputs, backend)
    run_on(backend, lambda x: sum_of_squares(x, backend=backend), inputs[:1])
    assert guarded == [DEVICE[backend]] * 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("whole", [False, True])
def test_equal_inputs_give_equal_bits(whole: bool, backend: str) -> None:
    inputs = make_inputs(50, 96, dtype=torch.float32, whole=whole)
    first, second = (run(inputs, backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_saves_its_inputs_and_a_number_a_row(backend: str) -> None:
    inputs = [
        x.to(DEVICE[backend]).requires_grad_() for x in make_inputs(3, 8, dtype=torch.float32)
    ]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        gated_rms_norm(*inputs, eps=EPS, backend=backend)
        gated_rms_norm(*inputs[:3], eps=EPS, backend=backend)
        sum_of_squares(inputs[0], backend=backend)
    known = {x.data_ptr() for x in inputs}
    assert known <= {x.data_ptr() for x in saved}
    assert [x.numel() for x in saved if x.data_ptr() not in known] == [3]


def test_auto_is_portable_on_a_cpu() -> None:
    assert gated_norm._choose_backend("auto", torch.zeros(2)) is gated_norm.portable


def test_triton_is_not_needed() -> None:
    """Where it does not load, kernels still import and "auto" still runs."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from kernels.gated_norm import gated_rms_norm, sum_of_squares\n"
        "x = torch.ones(2, 4)\n"
        "gated_rms_norm(x, x, x[0], sum_of_squares(x) / 4, eps=1e-6)\n"
        "gated_rms_norm(x, x, x[0], eps=1e-6, backend='fused')\n"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith('ValueError: backend "fused" needs Triton, which failed to load')


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "magic"}, "auto, fused, portable, reference, got 'magic'"),
        ({"x": torch.zeros(2, 4, dtype=torch.int32)}, "x must be floating point"),
        ({"gate": torch.zeros(2, 5)}, r"gate must be \[..., W\]"),
        ({"weight": torch.zeros(5)}, r"weight \[W\]"),
        ({"mean_square": torch.zeros(2)}, r"of shape \[2, 1\], got torch.float32 of shape \[2\]"),
        ({"mean_square": torch.zeros(2, 1).bfloat16()}, "mean_square must be torch.float32"),
        ({"gate": torch.zeros(2, 4, device="meta")}, "must be on one device, got cpu, meta"),
        ({"mean_square": torch.ones(2, 1, device="meta")}, "one device, got cpu, meta"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
    ],
)
def test_bad_input(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 4),
        "gate": torch.zeros(2, 4),
        "weight": torch.zeros(4),
        "mean_square": torch.ones(2, 1),
        "eps": EPS,
    }
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(**arguments | changes)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": torch.zeros(2, 4).double()}, "it takes float16, bfloat16 and float32"),
        (
            {
                "x": torch.zeros(2, 4, device="meta"),
                "gate": torch.zeros(2, 4, device="meta"),
                "weight": torch.zeros(4, device="meta"),
            },
            "got a tensor on meta",
        ),
        (
            {
                "x": torch.zeros(1, 65536),
                "gate": torch.zeros(1, 65536),
                "weight": torch.ones(65536),
            },
            "at most 16384 channels, got 65536",
        ),
    ],
)
def test_fused_says_what_it_cannot_do(changes: dict[str, Tensor], message: str) -> None:
    x, gate, weight = make_inputs(2, 4, dtype=torch.float32, whole=True)
    arguments = {"x": x, "gate": gate, "weight": weight} | changes
    arguments = {name: x if x.is_meta else x.to(DEVICE["fused"]) for name, x in arguments.items()}
    with pytest.raises(ValueError, match=f'backend "fused" does not fit: .*{message}'):
        gated_rms_norm(**arguments, eps=EPS, backend="fused")


def test_sum_of_squares_wants_channels() -> None:
    with pytest.raises(ValueError, match="floating point"):
        sum_of_squares(torch.tensor(1.0))
    with pytest.raises(ValueError, match="auto, fused, portable, reference"):
        sum_of_squares(torch.ones(2), backend="magic")
