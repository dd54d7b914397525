"""Lightning attention as its definition: one token after another. The truth for every backend.

Shapes: B batch, T tokens, H heads, D key width, Dv value width, N documents.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import silu as apply_silu

from kernels.autocast import without_autocast
from kernels.packed import document_bounds


@without_autocast
def lightning_attention_reference(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHDv: Tensor,
    decay_H: Tensor,
    cu_seqlens: Tensor | None,
    initial_state_NHDDv: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """The recurrence of `lightning_attention`, differentiable by autograd itself, float64 if q is.

    Arguments are checked by the caller. Returns the output and the final states.
    """
    q, k, v = (_widened(x, silu) for x in (q_BTHD, k_BTHD, v_BTHDv))
    decay_factor = torch.exp(-decay_H.detach().to(q.dtype))
    outputs, states = [], []
    q_N, k_N, v_N = (_documents(x, cu_seqlens) for x in (q, k, v))
    for n, (q_LHD, k_LHD, v_LHDv) in enumerate(zip(q_N, k_N, v_N, strict=True)):
        if initial_state_NHDDv is None:
            state = q.new_zeros(*q.shape[2:], v.shape[-1])
        else:
            state = initial_state_NHDDv[n]
        o, state = _one_document(q_LHD, k_LHD, v_LHDv, decay_factor, state)
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs).reshape(v.shape).to(v_BTHDv.dtype), torch.stack(states)


def state(
    k_BTHD: Tensor, v_BTHDv: Tensor, decay_H: Tensor, cu_seqlens: Tensor | None, silu: bool
) -> Tensor:
    """`lightning_state` by the recurrence."""
    return lightning_attention_reference(k_BTHD, k_BTHD, v_BTHDv, decay_H, cu_seqlens, None, silu)[
        1
    ].detach()


@without_autocast
def state_gradient(
    q_BTHD: Tensor, d_o_BTHDv: Tensor, decay_H: Tensor, cu_seqlens: Tensor | None, silu: bool
) -> Tensor:
    """`lightning_state_gradient` as its formula."""
    q, d_o = _widened(q_BTHD.detach(), silu), _widened(d_o_BTHDv.detach(), False)
    sums = []
    for q_LHD, d_o_LHDv in zip(_documents(q, cu_seqlens), _documents(d_o, cu_seqlens), strict=True):
        step_L = torch.arange(1, len(q_LHD) + 1, device=q.device)
        weight_LH = torch.exp(-decay_H.to(q.dtype) * step_L[:, None])
        sums.append(torch.einsum("lh,lhd,lhv->hdv", weight_LH, q_LHD, d_o_LHDv))
    return torch.stack(sums)


def _widened(x: Tensor, silu: bool) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return apply_silu(x) if silu else x


def _documents(x_BTHD: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    if cu_seqlens is None:
        return list(x_BTHD)
    bounds = document_bounds(cu_seqlens, x_BTHD.shape[1])
    return [x_BTHD[0, begin:end] for begin, end in pairwise(bounds)]


def _one_document(
    q_THD: Tensor, k_THD: Tensor, v_THDv: Tensor, decay_factor_H: Tensor, state_HDDv: Tensor
) -> tuple[Tensor, Tensor]:
    outputs = [v_THDv[:0]]
    for q_HD, k_HD, v_HDv in zip(q_THD, k_THD, v_THDv, strict=True):
        state_HDDv = decay_factor_H[:, None, None] * state_HDDv
        state_HDDv = state_HDDv + k_HD[:, :, None] * v_HDv[:, None, :]
        outputs.append(torch.einsum("hd,hdv->hv", q_HD, state_HDDv)[None])
    return torch.cat(outputs), state_HDDv
