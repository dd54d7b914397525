"""Lightning attention as its definition: one token after another. The truth for every backend.

Shapes: B batch, T tokens, H heads, D key width, Dv value width, N documents.
"""

import torch
from torch import Tensor


def lightning_attention_reference(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHDv: Tensor,
    decay_H: Tensor,
    bounds: list[int] | None,
    initial_state_NHDDv: Tensor | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence of `lightning_attention`, differentiable by autograd itself, float64 if q is.

    Arguments are checked by the caller; `bounds` are the document borders of a packed row.
    """
    dtype = torch.promote_types(q_BTHD.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (q_BTHD, k_BTHD, v_BTHDv))
    B, T, H, D = q.shape
    decay_factor = torch.exp(-decay_H.detach().to(dtype))
    if bounds is None:
        documents = [(q[b], k[b], v[b]) for b in range(B)]
    else:
        spans = [slice(*span) for span in zip(bounds, bounds[1:], strict=False)]
        documents = [(q[0, span], k[0, span], v[0, span]) for span in spans]
    outputs, states = [], []
    for n, document in enumerate(documents):
        if initial_state_NHDDv is None:
            state = q.new_zeros(H, D, v.shape[-1])
        else:
            state = initial_state_NHDDv[n]
        o, state = _one_document(*document, decay_factor, state)
        outputs.append(o)
        states.append(state)
    o_BTHDv = torch.cat(outputs).reshape(v.shape).to(v_BTHDv.dtype)
    return o_BTHDv, torch.stack(states) if return_final_state else None


def _one_document(
    q_THD: Tensor, k_THD: Tensor, v_THDv: Tensor, decay_factor_H: Tensor, state_HDDv: Tensor
) -> tuple[Tensor, Tensor]:
    outputs = [v_THDv[:0]]
    for q_HD, k_HD, v_HDv in zip(q_THD, k_THD, v_THDv, strict=True):
        state_HDDv = decay_factor_H[:, None, None] * state_HDDv
        state_HDDv = state_HDDv + k_HD[:, :, None] * v_HDv[:, None, :]
        outputs.append(torch.einsum("hd,hdv->hv", q_HD, state_HDDv)[None])
    return torch.cat(outputs), state_HDDv
