"""The Triton kernels against the recurrence in float64, on a GPU or under Triton's interpreter.

Chunks and pieces are short here, so that short rows have many of both.
"""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import kernels.lightning.fused as fused
from kernels.lightning import (
    lightning_attention,
    lightning_attention_qkv,
    lightning_state,
    lightning_state_gradient,
)
from parallel import host
from tests.kernels.compare import outputs_and_gradients, relative_error

DEVICE = host.device()
H, D, DV = 2, 20, 12
DECAY = torch.tensor([0.0, 0.7], device=DEVICE)
HEAD = {"o": 2, "final_state": 1, "dq": 2, "dk": 2, "dv": 2, "d_initial_state": 1}
NO_PIECES = 1 << 20
# What the matrix products of a card's own FP32 path may lose against those of the CPU.
FP32 = 1e-6 if DEVICE.type == "cpu" else 1e-5


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`launch(chunk, piece)` sets the lengths of chunks and pieces in the fused backend."""

    def set_lengths(chunk: int = 16, piece: int | None = None) -> None:
        config = fused.Config(chunk, 16, 4, 1)
        monkeypatch.setattr(fused, "config_for", lambda *shape: config)
        if piece is not None:
            monkeypatch.setattr(fused, "_piece_length", lambda *shape: piece)

    return set_lengths


def make_inputs(B: int, T: int, N: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    inputs = [torch.randn(B, T, H, width).to(DEVICE, dtype) for width in (D, D, DV)]
    return [*inputs, torch.randn(N, H, D, DV, device=DEVICE)]


def run(
    inputs: list[Tensor],
    bounds: list[int] | None = None,
    silu: bool = False,
    decay: Tensor = DECAY,
    backend: str = "fused",
) -> dict[str, Tensor]:
    if backend == "reference":
        inputs = [x.double() for x in inputs]
    cu_seqlens = None
    if bounds is not None:
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)

    def attend(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return lightning_attention(
            q,
            k,
            v,
            decay,
            cu_seqlens=cu_seqlens,
            initial_state=state,
            return_final_state=True,
            silu=silu,
            backend=backend,
        )

    outputs, gradients = outputs_and_gradients(attend, inputs)
    return dict(zip(HEAD, outputs + gradients, strict=True))


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    for name, dim in HEAD.items():
        error = relative_error(actual[name], expected[name], dim)
        assert error <= bound, f"{name}: {error:.1e} > {bound:.0e}"


PACKED = [0, 33, 33, 34, 70, 70]


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("piece", [32, NO_PIECES])
@pytest.mark.parametrize("bounds", [None, PACKED], ids=["batch", "packed"])
def test_matches_the_recurrence(
    launch: Callable[..., None], bounds: list[int] | None, piece: int, silu: bool
) -> None:
    launch(piece=piece)
    inputs = make_inputs(2, 40, 2) if bounds is None else make_inputs(1, 70, len(bounds) - 1)
    assert_close(run(inputs, bounds, silu), run(inputs, bounds, silu, backend="reference"), FP32)


@pytest.mark.parametrize("piece", [16, NO_PIECES])
@pytest.mark.parametrize("bounds", [None, [0, 0], [0, 1], [0, 16, 16], [0, 0, 17]], ids=str)
def test_lengths_around_a_chunk_and_a_piece(
    launch: Callable[..., None], bounds: list[int] | None, piece: int
) -> None:
    launch(piece=piece)
    inputs = make_inputs(1, 0, 1) if bounds is None else make_inputs(1, bounds[-1], len(bounds) - 1)
    assert_close(run(inputs, bounds), run(inputs, bounds, backend="reference"), FP32)


@pytest.mark.parametrize("bounds", [[0, 1, 2, 3, 4], [0, 15, 31, 32, 48], [0, 0, 16, 16, 33]])
def test_borders_on_and_beside_those_of_pieces(
    launch: Callable[..., None], bounds: list[int]
) -> None:
    launch(piece=16)
    inputs = make_inputs(1, bounds[-1], len(bounds) - 1)
    assert_close(run(inputs, bounds), run(inputs, bounds, backend="reference"), FP32)


def test_the_chunk_changes_rounding_alone(launch: Callable[..., None]) -> None:
    inputs = make_inputs(1, 70, 2)
    results = []
    for chunk, piece in ((16, 32), (32, 64), (64, NO_PIECES)):
        launch(chunk, piece)
        results.append(run(inputs, [0, 45, 70]))
    for other in results[1:]:
        assert_close(other, results[0], 4 * FP32)


@pytest.mark.parametrize("cut", [0, 1, 32, 37])
def test_a_row_may_be_cut_anywhere(launch: Callable[..., None], cut: int) -> None:
    launch(piece=32)
    q, k, v, state = make_inputs(1, 70, 1)
    attend = partial(lightning_attention, return_final_state=True, backend="fused")
    whole, final = attend(q, k, v, DECAY, initial_state=state)
    left, state = attend(q[:, :cut], k[:, :cut], v[:, :cut], DECAY, initial_state=state)
    right, state = attend(q[:, cut:], k[:, cut:], v[:, cut:], DECAY, initial_state=state)
    assert relative_error(torch.cat((left, right), 1), whole, 2) < 4 * FP32
    assert relative_error(state, final, 1) < 4 * FP32


def test_a_packed_document_is_as_if_alone(launch: Callable[..., None]) -> None:
    launch(piece=16)
    q, k, v, states = make_inputs(1, 70, len(PACKED) - 1)
    attend = partial(lightning_attention, return_final_state=True, backend="fused")
    cu_seqlens = torch.tensor(PACKED, dtype=torch.int32, device=DEVICE)
    o, final = attend(q, k, v, DECAY, cu_seqlens=cu_seqlens, initial_state=states)
    for n, (begin, end) in enumerate(pairwise(PACKED)):
        alone, alone_final = attend(
            *(x[:, begin:end] for x in (q, k, v)), DECAY, initial_state=states[n : n + 1]
        )
        assert relative_error(o[:, begin:end], alone, 2) < 4 * FP32
        assert relative_error(final[n : n + 1], alone_final, 1) < 4 * FP32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_a_float32_state(
    launch: Callable[..., None], dtype: torch.dtype
) -> None:
    launch(piece=32)
    inputs = make_inputs(1, 70, 2, dtype)
    actual, expected = (run(inputs, [0, 45, 70], True, backend=b) for b in ("fused", "reference"))
    assert actual["o"].dtype == actual["dq"].dtype == dtype
    assert actual["final_state"].dtype == torch.float32
    # The interpreter truncates to bfloat16 where a card rounds.
    assert_close(actual, expected, 8e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("piece", [16, NO_PIECES])
def test_steep_decays_stay_finite(launch: Callable[..., None], piece: int) -> None:
    """A state scaled by exp(+s * chunk) overflows for s * chunk > 88, and so does one that forgets
    to clamp the rows beyond the end of a last chunk: 33 tokens leave 15 such rows."""
    launch(piece=piece)
    decay = torch.tensor([6.0, 1e4], device=DEVICE)
    inputs = make_inputs(1, 66, 2)
    actual = run(inputs, [0, 33, 66], decay=decay)
    assert all(x.isfinite().all() for x in actual.values())
    # The exponent itself has the precision of float32.
    assert_close(actual, run(inputs, [0, 33, 66], decay=decay, backend="reference"), 1e-4)


def test_views_of_any_strides_are_read_in_place(launch: Callable[..., None]) -> None:
    launch(piece=32)
    fused_qkv = torch.randn(75, 1, H, 3 * D, device=DEVICE).transpose(0, 1)
    q, k, v = fused_qkv.chunk(3, dim=-1)
    k = k.transpose(1, 3).contiguous().transpose(1, 3)
    addresses = []
    original = fused._sweep_row

    def record(row: object, queries: Tensor | None, silu: bool, outer: tuple, *a, **b) -> None:
        addresses.extend(x.data_ptr() for x in (queries, *outer[:2]) if x is not None)
        original(row, queries, silu, outer, *a, **b)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_sweep_row", record)
        o = lightning_attention(q, k, v, DECAY, backend="fused")
    assert set(addresses) == {x.data_ptr() for x in (q, k, v)}
    expected = lightning_attention(
        *(x.contiguous().double() for x in (q, k, v)), DECAY, backend="reference"
    )
    assert relative_error(o, expected, 2) < FP32


def test_a_fused_projection_has_one_gradient(launch: Callable[..., None]) -> None:
    launch(piece=32)
    qkv = torch.randn(1, 75, H, 3 * D, device=DEVICE)
    (expected,), (d_expected,) = outputs_and_gradients(
        lambda x: lightning_attention_qkv(x, DECAY, silu=True, backend="reference"), [qkv.double()]
    )
    (actual,), (d_actual,) = outputs_and_gradients(
        lambda x: lightning_attention_qkv(x, DECAY, silu=True, backend="fused"), [qkv]
    )
    assert relative_error(actual, expected, 2) < FP32
    assert relative_error(d_actual, d_expected, 2) < FP32


@pytest.mark.parametrize("piece", [16, NO_PIECES])
def test_states_and_their_gradients_alone(launch: Callable[..., None], piece: int) -> None:
    launch(piece=piece)
    q, k, v, _ = make_inputs(1, 70, 1)
    cu_seqlens = torch.tensor(PACKED, dtype=torch.int32, device=DEVICE)
    for silu in (False, True):
        options = {"cu_seqlens": cu_seqlens, "silu": silu}
        for function, *tensors in ((lightning_state, k, v), (lightning_state_gradient, q, v)):
            actual = function(*tensors, DECAY, backend="fused", **options)
            wide = [x.double() for x in tensors]
            expected = function(*wide, DECAY, backend="reference", **options)
            assert relative_error(actual, expected, 1) < FP32


@pytest.mark.parametrize("piece", [32, NO_PIECES])
def test_a_backward_without_kept_states_computes_them(
    launch: Callable[..., None], piece: int
) -> None:
    launch(piece=piece)
    q, k, v, state = make_inputs(1, 70, 1)
    row = (q, k, v, DECAY, None, state)
    gradients = []
    for keep in (True, False):
        o, _, states = fused.forward(*row, False, True, keep)
        gradients.append([torch.full_like(x, torch.nan) for x in (q, k, v)])
        fused.backward(o, None, *row, states, True, *gradients[-1], False)
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("piece", [32, NO_PIECES])
def test_states_of_any_strides(launch: Callable[..., None], piece: int) -> None:
    launch(piece=piece)
    q, k, v, _ = make_inputs(1, 40, 1)
    q, k = q[..., :DV], k[..., :DV]
    state = torch.randn(1, H, DV, DV, device=DEVICE).mT
    inputs = [q, k, v, state]
    assert_close(run(inputs), run(inputs, backend="reference"), FP32)


def test_the_launch_of_the_model_itself() -> None:
    """Heads of 128, whose values take two programs."""
    q, k, v = (torch.randn(1, 70, 1, 128, device=DEVICE) for _ in range(3))
    inputs = [q, k, v, torch.randn(1, 1, 128, 128, device=DEVICE)]
    decay = torch.tensor([0.3], device=DEVICE)
    actual = run(inputs, silu=True, decay=decay)
    assert_close(actual, run(inputs, silu=True, decay=decay, backend="reference"), FP32)


def test_equal_inputs_give_equal_bits(launch: Callable[..., None]) -> None:
    launch(piece=32)
    inputs = make_inputs(1, 70, len(PACKED) - 1)
    first, second = (run(inputs, PACKED, True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_borders_changed_in_place_are_seen(launch: Callable[..., None]) -> None:
    launch(piece=32)
    q, k, v, _ = make_inputs(1, 64, 2)
    cu_seqlens = torch.tensor([0, 32, 64], dtype=torch.int32, device=DEVICE)
    lightning_attention(q, k, v, DECAY, cu_seqlens=cu_seqlens, backend="fused")
    cu_seqlens[1] = 5
    o = lightning_attention(q, k, v, DECAY, cu_seqlens=cu_seqlens, backend="fused")
    expected = lightning_attention(
        *(x.double() for x in (q, k, v)), DECAY, cu_seqlens=cu_seqlens, backend="reference"
    )
    assert relative_error(o, expected, 2) < FP32


def test_every_row_has_pieces_enough() -> None:
    """The piece of a long row with few heads fills a card twice; that of many heads is the row."""
    few = fused._piece_length(131072, 16, torch.device("cpu"))
    assert 131072 // few * 16 >= 2 * 132 and few >= fused.SHORTEST_PIECE
    assert fused._piece_length(131072, 4 * 132, torch.device("cpu")) > 131072
    assert fused._piece_length(700, 1, torch.device("cpu")) > 700


@pytest.mark.gpu  # The interpreter copies the whole memory, 5 GB, onto itself.
def test_channels_farther_apart_than_two_to_the_31(launch: Callable[..., None]) -> None:
    launch()
    step, width = 2**28, 10
    far = torch.empty(step * (width - 1) + 64, dtype=torch.float16, device=DEVICE)
    q, k, v = (torch.randn(1, 3, H, width).half().to(DEVICE) for _ in range(3))
    far_k = far.as_strided(k.shape, (6, 2, 1, step)).copy_(k)
    o, far_o = (lightning_attention(q, x, v, DECAY, backend="fused") for x in (k, far_k))
    assert torch.equal(far_o, o)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    T, heads, width = 2**31 // (8 * 3 * 128) + 1000, 8, 128
    qkv = torch.randn(1, T, heads, 3 * width, device="cuda", dtype=torch.bfloat16)
    decay = torch.linspace(0.01, 0.9, heads, device="cuda")
    o = lightning_attention_qkv(qkv, decay, backend="fused")
    tail = lightning_attention_qkv(qkv[:, -4096:].float(), decay, backend="portable")
    assert relative_error(o[:, -1000:], tail[:, -1000:], 2) < 1e-2


def compiled(*arguments: str) -> str:
    """What Python says that compiles for a card that is not here, by the code that would launch."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=Path(__file__).resolve().parents[2],
        env={"PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_kernels_compile_for_hopper_without_spilling_much() -> None:
    said = compiled("tools/compile_kernels.py", "--only", "lightning")
    sweeps = [line.split() for line in said.splitlines() if line.startswith("sweep")]
    assert len(sweeps) >= 12
    assert all(int(columns[-1]) <= 64 for columns in sweeps), said


OTHER_LENGTHS = """
import torch
from kernels.lightning import fused
from tools.compile_kernels import compiling

with compiling(90) as kernels:
    for tokens, documents in ((2048, 1), (2080, 16), (2049, 17)):
        q = torch.empty(1, tokens, 1, 16, dtype=torch.bfloat16, device="meta")
        decay = torch.empty(1, device="meta")
        borders = torch.empty(documents + 1, dtype=torch.int32, device="meta")
        fused.forward(q, q, q, decay, borders, None, True, False, True, piece=512)
print(len(kernels), len({id(kernel) for kernel in kernels}))
"""


def test_rows_of_other_lengths_compile_nothing_anew() -> None:
    assert compiled("-c", OTHER_LENGTHS).split() == ["9", "3"]
