"""One token for each of many sequences, and prefill onto states that exist: inference.

The states of all sequences lie in one pool; a slot number says which row of it is whose. No
gradients are recorded.

Shapes: S sequences in this step, P slots in the pool, T tokens of a packed prefill, H heads, D key
width, Dv value width.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu as apply_silu

from kernels.lightning import DTYPES, check_decay, choose_backend, lightning_attention


@torch.no_grad()
def lightning_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    states: Tensor,
    slots: Tensor | slice,
    *,
    silu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The next token of each sequence: `S <- exp(-decay) S + k v^T` in place, `o = q^T S`.

    Args:
        q, k: `[S, H, D]`, float16, bfloat16, float32 or float64, any strides.
        v: `[S, H, Dv]` of the same dtype.
        decay: `[H]` float32, the finite slopes s_h >= 0.
        states: `[P, H, D, Dv]` float32 (float64 for float64 q), contiguous, changed in place.
        slots: `[S]` int32 or int64, which state each sequence has; no two alike. A negative slot
            is filling: its output is zero and no state is touched. Or a slice of the pool of S
            states, which PyTorch then changes where they lie, without copies.
        silu: apply SiLU to q, k and v first.
        backend: as in `lightning_attention`; "reference" is the portable path.

    Returns:
        `[S, H, Dv]` in v's dtype.

    Raises:
        ValueError: a shape, dtype, device, slope, slot or backend that does not fit. Slots and
            slopes on a device are not checked, as that would wait for it.
    """
    decode = getattr(choose_backend(backend, q), "decode", _decode)
    if isinstance(slots, slice):
        places = range(*slots.indices(states.shape[0]))
        if decode is not _decode or len(places) != q.shape[0]:
            end = places.start + len(places) * places.step
            slots = torch.arange(places.start, end, places.step, device=q.device)
    _check(q, k, v, decay, states, slots)
    return decode(q, k, v, decay, states, slots, silu)


@torch.no_grad()
def lightning_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    states: Tensor,
    slots: Tensor,
    *,
    cu_seqlens: Tensor,
    silu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The next tokens of each sequence, any number of them, onto the states in the pool, in place.

    Any split of a sequence into prefills and decode steps gives the output of one call.

    Args:
        q, k, v: `[1, T, H, D]` and `[1, T, H, Dv]`, the sequences packed into one row.
        cu_seqlens: `[S+1]` int32 borders of the sequences in the row.
        slots: `[S]` int64 or int32, none negative, no two alike.

    Other arguments are those of `lightning_decode`, the result (`[1, T, H, Dv]`) and further errors
    those of `lightning_attention`.
    """
    if q.dim() == 4 and v.dim() == 4:  # lightning_attention names what is wrong with others
        _check_pool(states, q.dtype, [*q.shape[2:], v.shape[3]])
    _check_slots(slots, cu_seqlens.numel() - 1, states.shape[0], with_filling=False)
    _check_devices(q=q, states=states, slots=slots)
    index = slots.long()
    o, final = lightning_attention(
        q,
        k,
        v,
        decay,
        cu_seqlens=cu_seqlens,
        initial_state=states.index_select(0, index),
        return_final_state=True,
        silu=silu,
        backend=backend,
    )
    states.index_copy_(0, index, final)
    return o


def _decode(
    q_SHD: Tensor,
    k_SHD: Tensor,
    v_SHDv: Tensor,
    decay_H: Tensor,
    states_PHDDv: Tensor,
    slots_S: Tensor | slice,
    silu: bool,
) -> Tensor:
    """`lightning_decode` in PyTorch. Filling is left out by index, which waits for a device."""
    if isinstance(slots_S, slice):
        return _advance(q_SHD, k_SHD, v_SHDv, decay_H, states_PHDDv[slots_S], silu)
    live = (slots_S >= 0).nonzero()[:, 0]
    index = slots_S.long()[live]
    state = states_PHDDv[index]
    o_SHDv = torch.zeros(v_SHDv.shape, dtype=v_SHDv.dtype, device=v_SHDv.device)
    o_SHDv[live] = _advance(q_SHD[live], k_SHD[live], v_SHDv[live], decay_H, state, silu)
    states_PHDDv[index] = state
    return o_SHDv


def _advance(
    q_SHD: Tensor, k_SHD: Tensor, v_SHDv: Tensor, decay_H: Tensor, state_SHDDv: Tensor, silu: bool
) -> Tensor:
    """One token onto each state, in place."""
    q, k, v = (x.to(state_SHDDv.dtype) for x in (q_SHD, k_SHD, v_SHDv))
    if silu:
        q, k, v = apply_silu(q), apply_silu(k), apply_silu(v)
    state_SHDDv.mul_(torch.exp(-decay_H.to(k.dtype))[:, None, None])
    state_SHDDv.addcmul_(k[..., None], v[..., None, :])
    return torch.matmul(q[..., None, :], state_SHDDv)[..., 0, :].to(v_SHDv.dtype)


def _check(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, states: Tensor, slots: Tensor | slice
) -> None:
    if q.dim() != 3 or k.shape != q.shape or v.dim() != 3 or v.shape[:2] != q.shape[:2]:
        raise ValueError(
            "q and k must be [S, H, D] and v [S, H, Dv], got "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    check_decay(decay, q.shape[1])
    _check_pool(states, q.dtype, [*q.shape[1:], v.shape[2]])
    _check_devices(q=q, k=k, v=v, decay=decay, states=states)
    if isinstance(slots, Tensor):
        _check_slots(slots, q.shape[0], states.shape[0], with_filling=True)
        _check_devices(q=q, slots=slots)


def _check_pool(states: Tensor, dtype: torch.dtype, shape: list[int]) -> None:
    """`shape` is that of one state, `dtype` that of q."""
    dtype = torch.promote_types(dtype, torch.float32)
    if list(states.shape[1:]) != shape or states.dtype != dtype or not states.is_contiguous():
        raise ValueError(
            f"states must be contiguous {dtype} of shape {['P', *shape]}, got {states.dtype} of "
            f"shape {list(states.shape)} and strides {list(states.stride())}"
        )


def _check_slots(slots: Tensor, sequences: int, pool: int, with_filling: bool) -> None:
    """A negative slot is filling, where there may be such."""
    if list(slots.shape) != [sequences] or slots.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"slots must be int32 or int64 of shape [{sequences}], got {slots.dtype} of shape "
            f"{list(slots.shape)}"
        )
    if slots.device.type != "cpu":
        return
    used = [slot for slot in slots.tolist() if slot >= 0 or not with_filling]
    if used and (min(used) < 0 or max(used) >= pool or len(set(used)) < len(used)):
        raise ValueError(f"slots must differ and be in 0..{pool - 1}, got {used}")


def _check_devices(**tensors: Tensor) -> None:
    if len({x.device for x in tensors.values()}) > 1:
        found = ", ".join(f"{name} on {x.device}" for name, x in tensors.items())
        raise ValueError(f"{', '.join(tensors)} must be on one device, got {found}")
