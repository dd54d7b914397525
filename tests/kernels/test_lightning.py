"""Lightning attention against the token recurrence in float64. Every comparison is per head."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from kernels.lightning import (
    lightning_attention,
    lightning_attention_qkv,
    lightning_backward,
    lightning_forward,
    lightning_state,
    lightning_state_gradient,
)
from tests.kernels.compare import outputs_and_gradients, relative_error

H, D, DV = 4, 8, 6
# No decay, the slowest of a deep layer, a usual one, and one whose decay over a chunk underflows.
DECAY = torch.tensor([0.0, 0.004, 0.5, 50.0])
ALONE = ["o", "dq", "dk", "dv"]
HEAD = {"o": 2, "final_state": 1, "dq": 2, "dk": 2, "dv": 2, "d_initial_state": 1}


def make_inputs(
    B: int, T: int, N: int, dtype: torch.dtype = torch.float64, state: bool = True
) -> list[Tensor]:
    inputs = [torch.randn(B, T, H, width, dtype=torch.float64) for width in (D, D, DV)]
    inputs = [x.to(dtype) for x in inputs]
    if state:
        state_dtype = torch.promote_types(dtype, torch.float32)
        inputs.append(torch.randn(N, H, D, DV, dtype=state_dtype))
    return inputs


def run(inputs: list[Tensor], bounds: list[int] | None, backend: str) -> dict[str, Tensor]:
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)

    def function(
        q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return lightning_attention(
            q,
            k,
            v,
            DECAY,
            cu_seqlens=cu_seqlens,
            initial_state=initial_state,
            return_final_state=True,
            backend=backend,
        )

    outputs, gradients = outputs_and_gradients(function, inputs)
    return dict(zip(HEAD, outputs + gradients, strict=False))


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        error = relative_error(tensor, expected[name], HEAD[name])
        assert error <= bound, f"{name}: {error:.1e} > {bound:.0e}"


LENGTHS = [0, 1, 5, 31, 32, 33, 63, 64, 65, 150]


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("T", LENGTHS)
def test_portable_matches_the_recurrence(T: int, state: bool) -> None:
    inputs = make_inputs(2, T, 2, state=state)
    expected = run(inputs, None, "reference")
    assert_close(run(inputs, None, "portable"), expected, 1e-12)
    assert_close(run([x.float() for x in inputs], None, "portable"), expected, 2e-6)


PACKED = [
    [0, 70],
    [0, 0],
    [0, 1, 2, 3, 4],
    [0, 0, 0, 32, 64, 64],
    [0, 40, 40, 41, 73, 140, 140],
]


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("bounds", PACKED, ids=str)
def test_packed_matches_the_recurrence(bounds: list[int], state: bool) -> None:
    inputs = make_inputs(1, bounds[-1], len(bounds) - 1, state=state)
    expected = run(inputs, bounds, "reference")
    assert_close(run(inputs, bounds, "portable"), expected, 1e-12)
    assert_close(run([x.float() for x in inputs], bounds, "portable"), expected, 2e-6)


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_a_packed_document_is_as_if_alone(backend: str) -> None:
    bounds = [0, 40, 41, 120]
    q, k, v, states = make_inputs(1, bounds[-1], 3)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    o, final = lightning_attention(
        q,
        k,
        v,
        DECAY,
        cu_seqlens=cu_seqlens,
        initial_state=states,
        return_final_state=True,
        backend=backend,
    )
    for n, (begin, end) in enumerate(pairwise(bounds)):
        alone, alone_final = lightning_attention(
            *(x[:, begin:end] for x in (q, k, v)),
            DECAY,
            initial_state=states[n : n + 1],
            return_final_state=True,
            backend=backend,
        )
        assert relative_error(o[:, begin:end], alone, 2) < 1e-13
        assert relative_error(final[n : n + 1], alone_final, 1) < 1e-13


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("cut", [0, 1, 31, 32, 33, 69, 70])
def test_a_row_may_be_cut_anywhere(cut: int, backend: str) -> None:
    def whole(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return lightning_attention(
            q, k, v, DECAY, initial_state=state, return_final_state=True, backend=backend
        )

    def in_two(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        left, state = whole(q[:, :cut], k[:, :cut], v[:, :cut], state)
        right, state = whole(q[:, cut:], k[:, cut:], v[:, cut:], state)
        return torch.cat((left, right), dim=1), state

    inputs = make_inputs(2, 70, 2)
    expected = dict(zip(HEAD, sum(outputs_and_gradients(whole, inputs), []), strict=True))
    actual = dict(zip(HEAD, sum(outputs_and_gradients(in_two, inputs), []), strict=True))
    assert_close(actual, expected, 1e-12)


def test_reference_passes_gradcheck() -> None:
    q, k, v, state = make_inputs(2, 3, 2)
    narrow = (q[..., :2], k[..., :2], v[..., :2], state[..., :2, :2])
    inputs = [x.clone().requires_grad_() for x in narrow]
    assert torch.autograd.gradcheck(
        lambda *x: lightning_attention(
            *x[:3], DECAY, initial_state=x[3], return_final_state=True, backend="reference"
        ),
        inputs,
    )


@pytest.mark.parametrize("bounds", [None, [0, 30, 30, 75]])
def test_views_into_a_fused_projection_are_read_in_place(bounds: list[int] | None) -> None:
    fused = torch.randn(1, 75, H, 3 * D, dtype=torch.float64)
    views = list(fused.split(D, dim=-1))
    # [T, B, H, D] as Megatron keeps it, seen as [B, T, H, D].
    views[1] = views[1].transpose(0, 1).contiguous().transpose(0, 1)
    expected = run([x.contiguous() for x in views], bounds, "reference")
    assert_close(run(views, bounds, "portable"), expected, 1e-12)


def test_gradients_that_are_not_dense_are_read_right() -> None:
    inputs = [x.requires_grad_() for x in make_inputs(1, 40, 1)]
    gradients = {}
    for backend in ("reference", "portable"):
        o, final = lightning_attention(
            *inputs[:3],
            DECAY,
            initial_state=inputs[3],
            return_final_state=True,
            backend=backend,
        )
        gradients[backend] = torch.autograd.grad(o.sum() + final.sum(), inputs)
    for actual, expected in zip(gradients["portable"], gradients["reference"], strict=True):
        assert relative_error(actual, expected) < 1e-12


def test_gradient_through_the_final_state_alone() -> None:
    inputs = [x.requires_grad_() for x in make_inputs(1, 40, 1)]
    _, final = lightning_attention(
        *inputs[:3], DECAY, initial_state=inputs[3], return_final_state=True
    )
    dq, _, _, d_state = torch.autograd.grad(final.sum(), inputs)
    assert not dq.any()
    expected = torch.exp(-40 * DECAY.double())[:, None, None].expand(d_state.shape[1:])
    assert torch.allclose(d_state[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_float32_state(dtype: torch.dtype) -> None:
    bounds = [0, 40, 150]
    inputs = make_inputs(1, 150, 2, dtype)
    actual = run(inputs, bounds, "portable")
    assert actual["o"].dtype == actual["dq"].dtype == dtype
    assert actual["final_state"].dtype == actual["d_initial_state"].dtype == torch.float32
    # Only the weights of the gradient and the results are rounded to dtype.
    expected = run([x.double() for x in inputs], bounds, "reference")
    assert_close(actual, expected, 4e-3 if dtype == torch.bfloat16 else 5e-4)
    assert relative_error(actual["final_state"], expected["final_state"], 1) < 1e-6


def test_steep_decays_stay_finite() -> None:
    decay = torch.tensor([0.0, 2.0, 50.0, 1e4])
    q, k, v, state = make_inputs(1, 65, 1, torch.float32)
    for backend in ("reference", "portable"):
        o, final = lightning_attention(
            q, k, v, decay, initial_state=state, return_final_state=True, backend=backend
        )
        assert o.isfinite().all() and final.isfinite().all()
        # Nothing but the current token is left.
        own = (q[..., 3, :] * k[..., 3, :]).sum(-1, keepdim=True) * v[..., 3, :]
        assert torch.allclose(o[..., 3, :], own, rtol=1e-5, atol=1e-6)


def test_equal_inputs_give_equal_bits() -> None:
    bounds = [0, 40, 40, 41, 200]
    inputs = make_inputs(1, 200, 4, torch.float32)
    first, second = (run(inputs, bounds, "portable") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_output_alone_without_final_state() -> None:
    q, k, v, _ = make_inputs(1, 4, 1)
    o = lightning_attention(q, k, v, DECAY)
    assert isinstance(o, Tensor) and o.shape == (1, 4, H, DV) and o.is_contiguous()


@pytest.mark.parametrize("bounds", [None, [0, 30, 30, 75]])
@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_silu_inside_is_silu_before(backend: str, bounds: list[int] | None) -> None:
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    inputs = make_inputs(1, 75, 1 if bounds is None else 3)[:3]

    def outside(*qkv: Tensor) -> Tensor:
        qkv = tuple(silu(x) for x in qkv)
        return lightning_attention(*qkv, DECAY, cu_seqlens=cu_seqlens, backend="reference")

    def inside(*qkv: Tensor) -> Tensor:
        return lightning_attention(*qkv, DECAY, cu_seqlens=cu_seqlens, silu=True, backend=backend)

    expected = dict(zip(ALONE, sum(outputs_and_gradients(outside, inputs), []), strict=True))
    actual = dict(zip(ALONE, sum(outputs_and_gradients(inside, inputs), []), strict=True))
    assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("bounds", [None, [0, 30, 30, 75]])
def test_a_fused_projection_has_one_gradient(bounds: list[int] | None) -> None:
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    # [T, B, H, 3 D] as Megatron keeps it, seen as [B, T, H, 3 D].
    qkv = torch.randn(75, 1, H, 3 * D, dtype=torch.float64).transpose(0, 1)

    def separate(qkv: Tensor) -> Tensor:
        return lightning_attention(
            *qkv.chunk(3, dim=-1), DECAY, cu_seqlens=cu_seqlens, silu=True, backend="reference"
        )

    def fused(qkv: Tensor) -> Tensor:
        return lightning_attention_qkv(qkv, DECAY, cu_seqlens=cu_seqlens, silu=True)

    expected, (d_expected,) = outputs_and_gradients(separate, [qkv])
    actual, (d_actual,) = outputs_and_gradients(fused, [qkv])
    assert relative_error(actual[0], expected[0], 2) < 1e-12
    assert relative_error(d_actual, d_expected, 2) < 1e-12


@pytest.mark.parametrize("bounds", [None, [0, 1, 1, 40, 75]])
@pytest.mark.parametrize("with_silu", [False, True])
@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_states_and_their_gradients_alone(
    backend: str, with_silu: bool, bounds: list[int] | None
) -> None:
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    N = 1 if bounds is None else 4
    q, k, v, state = make_inputs(1, 75, N)
    o, final = lightning_attention(
        q,
        k,
        v,
        DECAY,
        cu_seqlens=cu_seqlens,
        initial_state=state.requires_grad_(),
        return_final_state=True,
        silu=with_silu,
        backend="reference",
    )
    d_o = torch.randn_like(o)
    (d_state,) = torch.autograd.grad(o, state, d_o)
    options = {"cu_seqlens": cu_seqlens, "silu": with_silu, "backend": backend}
    assert relative_error(lightning_state_gradient(q, d_o, DECAY, **options), d_state, 1) < 1e-12
    length = torch.tensor([75] if bounds is None else bounds).diff(prepend=torch.tensor([0]))
    length = length if bounds is None else length[1:]
    carried = torch.exp(-DECAY.double() * length[:, None])[..., None, None] * state
    from_zero = final - carried
    assert relative_error(lightning_state(k, v, DECAY, **options), from_zero, 1) < 1e-12


def bad(**changes: object) -> dict[str, object]:
    q, k, v, state = make_inputs(1, 6, 1, torch.float32)
    return {"q": q, "k": k, "v": v, "decay": DECAY, "initial_state": state} | changes


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "magic"}, "auto, fused, portable, reference, got 'magic'"),
        ({"backend": "fused", "q": torch.zeros(1, 6, H, D).double()}, "share one floating dtype"),
        ({"q": torch.zeros(6, H, D)}, r"q and k must be \[B, T, H, D\]"),
        ({"k": torch.zeros(1, 6, H, D + 1)}, r"q and k must be \[B, T, H, D\]"),
        ({"v": torch.zeros(1, 5, H, DV)}, r"v \[B, T, H, Dv\]"),
        ({"v": torch.zeros(1, 6, H, DV).bfloat16()}, "share one floating dtype"),
        ({"decay": DECAY.double()}, r"decay must be float32 of shape \[4\]"),
        ({"decay": DECAY[:2]}, r"decay must be float32 of shape \[4\]"),
        ({"decay": DECAY.to("meta")}, "on one device"),
        ({"decay": -DECAY}, r"finite slopes s >= 0, got -50.0 to"),
        ({"decay": DECAY * torch.nan}, "finite slopes s >= 0, got nan to nan"),
        ({"decay": DECAY + torch.inf}, "finite slopes s >= 0, got inf to inf"),
        ({"decay": DECAY.clone().requires_grad_()}, "decay must not require a gradient"),
        ({"v": torch.zeros(1, 6, H, 0)}, "a head and a channel at least"),
        ({"initial_state": torch.zeros(2, H, D, DV)}, r"of shape \[1, 4, 8, 6\]"),
        ({"initial_state": torch.zeros(1, H, D, DV).double()}, "torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "must be int32"),
        ({"cu_seqlens": int32(0)}, r"\[N\+1\]"),
        ({"cu_seqlens": int32(0, 5)}, "from 0 to the 6 tokens"),
        ({"cu_seqlens": int32(1, 6)}, "from 0 to the 6 tokens"),
        ({"cu_seqlens": int32(0, 4, 2, 6)}, "entry 1 is 4 and entry 2 is 2"),
        ({"cu_seqlens": int32(0, 2, 6)}, r"of shape \[2, 4, 8, 6\]"),
    ],
)
def test_bad_input(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lightning_attention(**bad(**changes))


def test_fused_names_what_it_cannot_do() -> None:
    q, k, v, _ = make_inputs(1, 6, 1)
    with pytest.raises(ValueError, match='"fused" does not fit: it takes float16, .*float64'):
        lightning_attention(q, k, v, DECAY, backend="fused")


@pytest.mark.parametrize("fused", [False, True])
def test_without_autograd_gradients_are_written_side_by_side(fused: bool) -> None:
    """A document in two stretches, its state handed on by hand."""
    qkv = torch.randn(1, 100, H, 3 * D, dtype=torch.float64, requires_grad=True)
    o = lightning_attention_qkv(qkv, DECAY, silu=True)
    d_o = torch.randn_like(o)
    (expected,) = torch.autograd.grad(o, qkv, d_o)

    row = (qkv.detach(),) if fused else qkv.detach().chunk(3, dim=-1)
    stretches = slice(0, 41), slice(41, 100)
    first, last = ([x[:, tokens] for x in row] for tokens in stretches)
    k, v = (x[:, :41] for x in qkv.detach().chunk(3, dim=-1)[1:])
    state = lightning_state(k, v, DECAY, silu=True)
    o_first, kept_first = lightning_forward(first, DECAY, silu=True)
    o_last, kept_last = lightning_forward(last, DECAY, initial_state=state, silu=True)
    torch.testing.assert_close(torch.cat([o_first, o_last], dim=1), o)

    q = qkv.detach().chunk(3, dim=-1)[0][:, 41:]
    d_state = lightning_state_gradient(q, d_o[:, 41:], DECAY, silu=True)
    d_row = [torch.full_like(x, torch.nan) for x in row]
    for heads, tokens, kept, states in (
        (first, stretches[0], kept_first, {"d_final_state": d_state}),
        (last, stretches[1], kept_last, {"initial_state": state}),
    ):
        d_heads = [dx[:, tokens] for dx in d_row]
        lightning_backward(d_o[:, tokens], heads, d_heads, DECAY, kept, silu=True, **states)
    torch.testing.assert_close(torch.cat(d_row, dim=-1), expected)


def test_the_recurrence_needs_autograd() -> None:
    with pytest.raises(ValueError, match='"reference" has no backward of its own'):
        lightning_forward(make_inputs(1, 4, 1, state=False), DECAY, backend="reference")


def test_a_fused_projection_has_three_parts() -> None:
    with pytest.raises(ValueError, match=r"qkv must be \[B, T, H, 3 D\], got \[1, 2, 4, 8\]"):
        lightning_attention_qkv(torch.zeros(1, 2, H, 8), DECAY)


def test_a_packed_row_has_batch_size_one() -> None:
    q, k, v, _ = make_inputs(2, 6, 2)
    with pytest.raises(ValueError, match="batch size 1"):
        lightning_attention(q, k, v, DECAY, cu_seqlens=int32(0, 6))
