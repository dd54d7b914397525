"""The gated RMSNorm in Triton: one kernel forwards and one backwards, each reads a row once.

A program holds a whole row, so a row has at most `WIDEST` channels. Backwards there are only as
many programs as keep the partial sums of dw small: program p takes the rows p, p + P, p + 2 P and
so on, loading one while it computes the one before, and the partial sums are added in the order of
p. No atomics: equal inputs give equal bits. The formulas are those of `portable.py`, in float32.

Shapes: R rows, W channels, P programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 16384
WIDEST_PREFETCHED = 8192
"""Beyond it the next row of dy, x and gate may not fit into shared memory."""
PARTIALS = 1 << 21
"""Float32 numbers in the partial sums of dw, at most: little beside the rows of a long batch."""


def sum_of_squares(x: Tensor) -> Tensor:
    """See `kernels.gated_norm.autograd.Backend`."""
    x_RW = _rows(x)
    R, W = x_RW.shape
    out = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _sum_of_squares[(R,)](x_RW, out, x_RW.stride(0), W, **_launch(W))
    return out


def sum_of_squares_backward(d_sum: Tensor, x: Tensor) -> Tensor:
    """See `kernels.gated_norm.autograd.Backend`."""
    x_RW, dx = _rows(x), _empty_like(x)
    R, W = x_RW.shape
    with torch.cuda.device_of(x):
        _sum_of_squares_backward[(R,)](
            d_sum.contiguous(), x_RW, dx, x_RW.stride(0), W, **_launch(W)
        )
    return dx


def forward(
    x: Tensor, gate: Tensor, weight: Tensor, mean_square: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """See `kernels.gated_norm.autograd.Backend`."""
    x_RW, gate_RW, y = _rows(x), _rows(gate), _empty_like(x)
    R, W = x_RW.shape
    whole = mean_square is None
    if mean_square is None:
        mean_square = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    mean_square = mean_square.contiguous()
    with torch.cuda.device_of(x):
        _forward[(R,)](
            x_RW,
            gate_RW,
            weight.contiguous(),
            mean_square,
            y,
            x_RW.stride(0),
            gate_RW.stride(0),
            W,
            eps,
            WHOLE=whole,
            **_launch(W),
        )
    return y, mean_square


def backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    mean_square: Tensor,
    eps: float,
    whole: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See `kernels.gated_norm.autograd.Backend`."""
    dy_RW, x_RW, gate_RW = _rows(dy), _rows(x), _rows(gate)
    R, W = x_RW.shape
    launch = _launch(W)
    P = min(R, PARTIALS // launch["TILE"])
    dx, dgate = _empty_like(x), _empty_like(gate)
    d_mean_square = None if whole else torch.empty_like(mean_square)
    dw_PW = torch.empty(P, W, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _backward[(P,)](
            dy_RW,
            x_RW,
            gate_RW,
            weight.contiguous(),
            mean_square,
            dx,
            dgate,
            dw_PW,
            d_mean_square,
            dy_RW.stride(0),
            x_RW.stride(0),
            gate_RW.stride(0),
            R,
            W,
            eps,
            WHOLE=whole,
            STAGES=2 if launch["TILE"] <= WIDEST_PREFETCHED else 1,
            **launch,
        )
    return dx, dgate, dw_PW.sum(0).to(weight.dtype), d_mean_square


def _rows(x: Tensor) -> Tensor:
    """`[R, W]` with dense channels: a view wherever the leading dimensions have one stride."""
    x_RW = x.reshape(-1, x.shape[-1])
    return x_RW if x_RW.stride(1) == 1 else x_RW.contiguous()


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _launch(W: int) -> dict[str, int]:
    """One tile for the whole row, and 256 channels of it or more for a warp."""
    tile = max(triton.next_power_of_2(W), 32)
    return {"TILE": tile, "num_warps": min(max(tile // 256, 1), 16)}


@triton.jit
def _sum_of_squares(x_ptr, sum_ptr, x_row, W, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, TILE)
    x = tl.load(x_ptr + row * x_row + channel, mask=channel < W, other=0.0).to(tl.float32)
    tl.store(sum_ptr + row, tl.sum(x * x))


@triton.jit
def _sum_of_squares_backward(  # type: ignore[no-untyped-def]
    d_sum_ptr, x_ptr, dx_ptr, x_row, W, TILE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, TILE)
    inside = channel < W
    x = tl.load(x_ptr + row * x_row + channel, mask=inside, other=0.0).to(tl.float32)
    dx = x * (2.0 * tl.load(d_sum_ptr + row))
    tl.store(dx_ptr + row * W + channel, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x_ptr,
    gate_ptr,
    weight_ptr,
    mean_square_ptr,
    y_ptr,
    x_row,
    gate_row,
    W,
    eps,
    WHOLE: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, TILE)
    inside = channel < W
    x = tl.load(x_ptr + row * x_row + channel, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_row + channel, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    if WHOLE:
        mean_square = tl.sum(x * x) / W
        tl.store(mean_square_ptr + row, mean_square)
    else:
        mean_square = tl.load(mean_square_ptr + row)
    y = x * tl.rsqrt(mean_square + eps) * w * tl.sigmoid(gate)
    tl.store(y_ptr + row * W + channel, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    dy_ptr,
    x_ptr,
    gate_ptr,
    weight_ptr,
    mean_square_ptr,
    dx_ptr,
    dgate_ptr,
    dw_ptr,
    d_mean_square_ptr,
    dy_row,
    x_row,
    gate_row,
    R,
    W,
    eps,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    channel = tl.arange(0, TILE)
    inside = channel < W
    w = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([TILE], tl.float32)
    for turn in tl.range(0, tl.cdiv(R - program, programs), num_stages=STAGES):
        row = program + turn * programs
        dy = tl.load(dy_ptr + row * dy_row + channel, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_row + channel, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + row * gate_row + channel, mask=inside, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.load(mean_square_ptr + row) + eps)
        g = tl.sigmoid(gate)
        normed = x * r
        d_normed = dy * g
        dw += d_normed * normed
        d_normed *= w
        v = d_normed * normed
        dgate = v * (1.0 - g)
        tl.store(dgate_ptr + row * W + channel, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
        if WHOLE:
            d_normed -= normed * (tl.sum(v) / W)
        else:
            tl.store(d_mean_square_ptr + row, -0.5 * tl.sum(v) * r * r)
        dx = d_normed * r
        tl.store(dx_ptr + row * W + channel, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dw_ptr + program * W + channel, dw, mask=inside)
