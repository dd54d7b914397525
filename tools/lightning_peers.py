"""Lightning attention as others compute it, each called in the way that suits it best.

Shapes: B batch, T tokens, H heads, D head width, N documents in a packed row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from kernels.lightning import lightning_attention


@dataclass(frozen=True)
class Shape:
    """What is computed: rows of tokens, or one packed row of documents with these borders."""

    batch: int
    tokens: int
    heads: int
    width: int
    dtype: torch.dtype
    bounds: tuple[int, ...] | None = None

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        documents = f", {len(self.bounds) - 1} documents" if self.bounds else ""
        return (
            f"B {self.batch}, T {self.tokens}, H {self.heads}, D {self.width}, {dtype}{documents}"
        )

    def inputs(self, device: torch.device, count: int = 3) -> list[Tensor]:
        """Random q, k, v and the like, `[B, T, H, D]`."""
        shape = (self.batch, self.tokens, self.heads, self.width)
        return [torch.randn(shape, dtype=self.dtype, device=device) for _ in range(count)]

    def decay(self, device: torch.device) -> Tensor:
        """MiniMax's slopes of a first layer, `[H]`."""
        exponent = torch.arange(1, self.heads + 1, device=device) * (-8 / self.heads)
        return torch.exp2(exponent.float())

    def cu_seqlens(self, device: torch.device) -> Tensor | None:
        if self.bounds is None:
            return None
        return torch.tensor(self.bounds, dtype=torch.int32, device=device)


class Peer:
    """One way to compute it: leaves that require gradients, and a call on them."""

    name: str

    def refuses(self, shape: Shape, device: torch.device) -> str | None:
        """Why it cannot take `shape`, in a few words; None where it can."""
        return None

    def leaves(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """q, k and v `[B, T, H, D]` as the call wants them."""
        return [x.detach().clone().requires_grad_() for x in (q, k, v)]

    def prepare(self, shape: Shape, device: torch.device) -> Callable[..., Tensor]:
        """The call on the leaves; returns `[B, T, H, D]`."""
        raise NotImplementedError

    def gradients(self, of_leaves: tuple[Tensor, ...]) -> list[Tensor]:
        """Gradients of the leaves as those of q, k and v."""
        return list(of_leaves)


class Ours(Peer):
    """A backend of `kernels.lightning`."""

    def __init__(self, backend: str) -> None:
        self.name = backend

    def refuses(self, shape: Shape, device: torch.device) -> str | None:
        on_gpu = device.type == "cuda"
        return None if self.name != "fused" or on_gpu else "it needs a CUDA device"

    def prepare(self, shape: Shape, device: torch.device) -> Callable[..., Tensor]:
        # The portable backend plans on the host.
        at = torch.device("cpu") if self.name == "portable" else device
        decay, cu_seqlens = shape.decay(device), shape.cu_seqlens(at)
        return lambda q, k, v: lightning_attention(
            q, k, v, decay, cu_seqlens=cu_seqlens, backend=self.name
        )


class Fla(Peer):
    """`chunk_simple_gla` of flash-linear-attention with a constant decay for each head."""

    name = "fla"

    def refuses(self, shape: Shape, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "it needs a CUDA device"
        return None if find_spec("fla") else "flash-linear-attention is not installed"

    def prepare(self, shape: Shape, device: torch.device) -> Callable[..., Tensor]:
        from fla.ops.simple_gla import chunk_simple_gla

        decay, cu_seqlens = shape.decay(device), shape.cu_seqlens(device)
        return lambda q, k, v: chunk_simple_gla(
            q, k, v, g_gamma=-decay, scale=1.0, cu_seqlens=cu_seqlens
        )[0]


class HuggingFace(Peer):
    """The loop over blocks of transformers' `MiniMaxLightningAttention`.

    The class itself runs, with its projections, SiLU and norm replaced by the identity and its
    slopes by ours, so that what is timed is the recurrence, the split before it and the transposes
    around it. One product with 1 remains of its gate. The leaf is what its projection would give:
    `[B, T, H * 3 D]`.
    """

    name = "transformers"

    def refuses(self, shape: Shape, device: torch.device) -> str | None:
        if shape.bounds is not None:
            return "it knows no documents"
        return None if shape.dtype == torch.float32 else "its decays are float32"

    def leaves(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [torch.cat((q, k, v), dim=-1).flatten(2).requires_grad_()]

    def prepare(self, shape: Shape, device: torch.device) -> Callable[..., Tensor]:
        from transformers.models.minimax.configuration_minimax import MiniMaxConfig
        from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

        config = MiniMaxConfig(
            hidden_size=shape.heads * shape.width,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            head_dim=shape.width,
            num_hidden_layers=2,
        )
        module: Any = MiniMaxLightningAttention(config, layer_idx=0).to(device)
        module.slope_rate = shape.decay(device)[:, None, None]
        decays = module.decay_factors(module.slope_rate)
        module.query_decay, module.key_decay, module.diagonal_decay = decays
        module.qkv_proj = module.out_proj = module.norm = module.act_fn = nn.Identity()
        self._shape = shape
        open_gate = torch.tensor(torch.inf, device=device)
        del module.output_gate
        module.output_gate = lambda hidden_states: open_gate

        def call(hidden_states: Tensor) -> Tensor:
            return module(hidden_states, None, None)[0].unflatten(2, (shape.heads, shape.width))

        return call

    def gradients(self, of_leaves: tuple[Tensor, ...]) -> list[Tensor]:
        heads = of_leaves[0].unflatten(2, (self._shape.heads, 3 * self._shape.width))
        return list(heads.chunk(3, dim=-1))


class Chunked(Peer):
    """The chunked form written down with whole tensors and einsum, left to autograd."""

    CHUNK, GROUP = 64, 32

    def __init__(self, compiled: bool) -> None:
        self.name = "compiled" if compiled else "einsum"
        self._compiled = compiled

    def refuses(self, shape: Shape, device: torch.device) -> str | None:
        if shape.bounds is not None:
            return "it knows no documents"
        chunks, rest = divmod(shape.tokens, self.CHUNK)
        fits = not rest and chunks % min(self.GROUP, chunks) == 0
        return None if fits else "its chunks do not fill the row"

    def prepare(self, shape: Shape, device: torch.device) -> Callable[..., Tensor]:
        group = min(self.GROUP, shape.tokens // self.CHUNK)
        decay = shape.decay(device)
        call = torch.compile(chunked, dynamic=False) if self._compiled else chunked
        return lambda q, k, v: call(q, k, v, decay, self.CHUNK, group)


def chunked(
    q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, decay_H: Tensor, chunk: int, group: int
) -> Tensor:
    """Scores inside chunks; states over the chunks of a group, and over the groups, by a matrix.

    Without a loop, so that a compiler sees few large operations. T is a multiple of chunk * group.
    """
    q, k, v = (x.float().unflatten(1, (-1, group, chunk)) for x in (q_BTHD, k_BTHD, v_BTHD))
    groups = q.shape[1]
    token_C = torch.arange(chunk, device=q.device)
    chunk_M = torch.arange(group, device=q.device) * chunk

    def power(steps: Tensor) -> Tensor:
        """exp(-s n) for n >= 0, else 0: `[H, *]`."""
        s = decay_H.view(-1, *[1] * steps.dim())
        return torch.where(steps >= 0, torch.exp(-s * steps.clamp(min=0)), 0.0)

    def carry(size: int, count: int) -> Tensor:
        """From what part n adds to what enters part m > n, parts of `size` tokens: `[H, m, n]`."""
        part = torch.arange(count, device=q.device)
        return power(size * (part[:, None] - 1 - part))

    scores = torch.einsum("bgmihd,bgmjhd->bgmhij", q, k) * power(token_C[:, None] - token_C)
    o = torch.einsum("bgmhij,bgmjhv->bgmihv", scores, v)
    k_decayed = torch.einsum("hj,bgmjhd->bgmjhd", power(chunk - 1 - token_C), k)
    added = torch.einsum("bgmjhd,bgmjhv->bgmhdv", k_decayed, v)
    by_group = torch.einsum("hm,bgmhdv->bghdv", power(chunk_M.flip(0)), added)
    entering_group = torch.einsum("hfg,bghdv->bfhdv", carry(group * chunk, groups), by_group)
    entering = torch.einsum("hmn,bgnhdv->bgmhdv", carry(chunk, group), added)
    entering = entering + torch.einsum("hm,bghdv->bgmhdv", power(chunk_M), entering_group)
    q_decayed = torch.einsum("hi,bgmihd->bgmihd", power(token_C + 1), q)
    o = o + torch.einsum("bgmihd,bgmhdv->bgmihv", q_decayed, entering)
    return o.flatten(1, 3).to(v_BTHD.dtype)
