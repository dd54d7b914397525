"""What a packed row is: documents laid end to end, their borders in `cu_seqlens`."""

import torch
from torch import Tensor


def document_bounds(cu_seqlens: Tensor, tokens: int) -> list[int]:
    """The N+1 document borders of a packed row of `tokens` tokens, checked and as plain integers.

    `cu_seqlens` is `[N+1]` int32; equal neighbours are a document of length zero. Reading it on the
    host waits for the device when the tensor lies on one. Raises ValueError unless it starts at 0,
    never falls and ends at `tokens`.
    """
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            f"cu_seqlens must be int32 of shape [N+1] with N >= 1, got {cu_seqlens.dtype} of shape "
            f"{list(cu_seqlens.shape)}"
        )
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens:
        raise ValueError(
            f"cu_seqlens must run from 0 to the {tokens} tokens of the row, got {bounds[0]} to "
            f"{bounds[-1]}"
        )
    falling = [i for i in range(len(bounds) - 1) if bounds[i + 1] < bounds[i]]
    if falling:
        i = falling[0]
        raise ValueError(
            f"cu_seqlens must never fall, but entry {i} is {bounds[i]} and entry {i + 1} is "
            f"{bounds[i + 1]}"
        )
    return bounds
