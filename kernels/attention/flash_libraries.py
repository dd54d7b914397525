"""Three FlashAttention kernels for packed rows, each called by what it exports.

All take half precision on a CUDA device, `q` `[T, H, D]` against `k` and `v` `[S, K, D]` with D a
multiple of 8, and give `lse` `[H, T]`. A backward takes any `out` and `lse`. What they add up in
more than one thread block, dq and in FlashAttention-3 with grouped queries dk and dv too, keeps its
order only under `torch.use_deterministic_algorithms`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """The borders of the segments as a kernel wants them."""

    cu_q: Tensor
    """`[N+1]` int32 on the device."""
    cu_k: Tensor
    max_q: int
    """The longest segment, known on the host."""
    max_k: int
    causal: bool


@dataclass(frozen=True)
class Library:
    """One implementation: its two passes, and why it cannot run on a device, or None."""

    forward: Callable[[Tensor, Tensor, Tensor, Packed, float], tuple[Tensor, Tensor]]
    """q, k, v, packed, scale: out and lse."""
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Packed, float],
        tuple[Tensor, Tensor, Tensor],
    ]
    """d_out, q, k, v, out, lse, packed, scale: dq, dk and dv."""
    missing: Callable[[torch.device], str | None]


def _flash_attention_3_forward(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.flash_attn_3.fwd(
        q,
        k,
        v,
        cu_seqlens_q=packed.cu_q,
        cu_seqlens_k=packed.cu_k,
        max_seqlen_q=packed.max_q,
        max_seqlen_k=packed.max_k,
        softmax_scale=scale,
        is_causal=packed.causal,
        num_splits=1,
    )
    return out, lse


def _flash_attention_3_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    packed: Packed,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    torch.ops.flash_attn_3.bwd(
        d_out,
        q,
        k,
        v,
        out,
        lse,
        dq=dq,
        dk=dk,
        dv=dv,
        cu_seqlens_q=packed.cu_q,
        cu_seqlens_k=packed.cu_k,
        max_seqlen_q=packed.max_q,
        max_seqlen_k=packed.max_k,
        softmax_scale=scale,
        is_causal=packed.causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return dq, dk, dv


def _flash_attention_3_missing(device: torch.device) -> str | None:
    if _capability(device) != 9:
        return "it needs a Hopper GPU"
    module = _imported("flash_attn_interface")
    exported = getattr(torch.ops, "flash_attn_3", None)
    if module is None or not (hasattr(exported, "fwd") and hasattr(exported, "bwd")):
        return "flash_attn_interface (FlashAttention-3) is not installed"
    return None


def _flash_attention_2_forward(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = import_module("flash_attn.flash_attn_interface")._flash_attn_varlen_forward(
        q,
        k,
        v,
        cu_seqlens_q=packed.cu_q,
        cu_seqlens_k=packed.cu_k,
        max_seqlen_q=packed.max_q,
        max_seqlen_k=packed.max_k,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=packed.causal,
    )
    return out, lse


def _flash_attention_2_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    packed: Packed,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    import_module("flash_attn.flash_attn_interface")._flash_attn_varlen_backward(
        d_out,
        q,
        k,
        v,
        out,
        lse,
        dq=dq,
        dk=dk,
        dv=dv,
        cu_seqlens_q=packed.cu_q,
        cu_seqlens_k=packed.cu_k,
        max_seqlen_q=packed.max_q,
        max_seqlen_k=packed.max_k,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=packed.causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return dq, dk, dv


def _flash_attention_2_missing(device: torch.device) -> str | None:
    if _capability(device) < 8:
        return "it needs an Ampere GPU or a later one"
    if _imported("flash_attn.flash_attn_interface") is None:
        return "flash_attn (FlashAttention-2) is not installed"
    version = import_module("flash_attn").__version__
    if tuple(map(int, version.split(".")[:2])) < (2, 7):
        return f"it needs flash_attn 2.7 or later, got {version}"
    return None


def _torch_flash_forward(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        packed.cu_q,
        packed.cu_k,
        packed.max_q,
        packed.max_k,
        0.0,
        packed.causal,
        False,
        scale=scale,
    )
    return out, lse


def _torch_flash_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    packed: Packed,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # What dropout would need, and a tensor that nothing reads.
    random_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        d_out,
        q,
        k,
        v,
        out,
        lse,
        packed.cu_q,
        packed.cu_k,
        packed.max_q,
        packed.max_k,
        0.0,
        packed.causal,
        random_state,
        unused,
        scale=scale,
    )


def _torch_flash_missing(device: torch.device) -> str | None:
    if _capability(device) < 8:
        return "it needs an Ampere GPU or a later one"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of PyTorch lacks it"
    return None


@cache
def _capability(device: torch.device) -> int:
    """The major compute capability of an NVIDIA GPU, 0 for anything else."""
    if device.type != "cuda" or torch.version.cuda is None:
        return 0
    return torch.cuda.get_device_capability(device)[0]


@cache
def _imported(name: str) -> ModuleType | None:
    try:
        return import_module(name)
    except ImportError:
        return None


LIBRARIES = {
    "flash_attention_3": Library(
        _flash_attention_3_forward, _flash_attention_3_backward, _flash_attention_3_missing
    ),
    "flash_attention_2": Library(
        _flash_attention_2_forward, _flash_attention_2_backward, _flash_attention_2_missing
    ),
    "torch_flash": Library(_torch_flash_forward, _torch_flash_backward, _torch_flash_missing),
}
"""By name, the fastest first."""
