"""What the Triton kernels cost on a card that need not be there: registers, spills, shared memory.

    python tools/compile_kernels.py [--heads 8] [--tokens 32768] [--head-dim 128] [--dtype bf16]
                                    [--capability 90] [--only NAME]

Every kernel of a call to each operator is compiled for the card, by the code that would launch it,
on tensors that hold no memory; `ptxas` of Triton's own package then counts. Spilled registers in a
kernel that walks a long row show here without a GPU.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kernels.triton_runtime import INTERPRETED

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Compiled:
    """One kernel as the card would run it."""

    name: str
    warps: int
    stages: int
    shared_bytes: int
    registers: int
    spilled_bytes: int


class _AbsentCard:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(capability: int) -> Iterator[list[Any]]:
    """Launches inside compile for the card and run nothing; yields the kernels in order."""
    if INTERPRETED:
        raise SystemExit("compile_kernels: unset TRITON_INTERPRET, under which nothing is compiled")
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, **options: Any) -> Any:
        kernels.append(run(self, *args, **options | {"warmup": True}))
        return kernels[-1]

    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(_AbsentCard(capability))
    try:
        with patch.object(JITFunction, "run", compile_only):
            yield kernels
    finally:
        triton.runtime.driver._active = before


def examine(kernel: Any, capability: int) -> Compiled:
    """Registers and spills as `ptxas` reports them."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(kernel.asm["ptx"])
        ptx.flush()
        ptxas = triton.knobs.nvidia.ptxas.path
        command = [ptxas, "-v", f"--gpu-name=sm_{capability}a", ptx.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = (
        re.search(pattern, said) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill st")
    )
    assert registers and spilled, said
    meta = kernel.metadata
    return Compiled(
        meta.name,
        meta.num_warps,
        meta.num_stages,
        meta.shared,
        int(registers.group(1)),
        int(spilled.group(1)),
    )


def lightning(tokens: int, heads: int, width: int, dtype: torch.dtype, silu: bool) -> None:
    """A packed row through all passes of lightning attention, cut into pieces."""
    from kernels.lightning import fused

    qkv = torch.empty(1, tokens, heads, 3 * width, dtype=dtype, device="meta")
    q, k, v = qkv.chunk(3, dim=-1)
    d_q, d_k, d_v = torch.empty_like(qkv).chunk(3, dim=-1)
    decay = torch.empty(heads, device="meta")
    borders = torch.empty(9, dtype=torch.int32, device="meta")
    row = (q, k, v, decay, borders, None)
    piece = max(tokens // 8, fused.SHORTEST_PIECE)
    o, final, states = fused.forward(*row, True, silu, True, piece=piece)
    fused.backward(o, final, *row, states, silu, d_q, d_k, d_v, True, piece=piece)


def decode(heads: int, width: int, dtype: torch.dtype) -> None:
    """One step of 64 sequences."""
    from kernels.lightning import fused

    qkv = torch.empty(64, heads, 3 * width, dtype=dtype, device="meta")
    decay = torch.empty(heads, device="meta")
    states = torch.empty(64, heads, width, width, device="meta")
    slots = torch.empty(64, dtype=torch.int32, device="meta")
    fused.decode(*qkv.chunk(3, dim=-1), decay, states, slots, silu=True)


def gated_norm(tokens: int, width: int, dtype: torch.dtype) -> None:
    """The gated norm of a row, alone and as one of several tensor-parallel ranks."""
    from kernels.gated_norm import fused

    x = torch.empty(tokens, width, dtype=dtype, device="meta")
    weight = torch.empty(width, dtype=dtype, device="meta")
    squares = fused.sum_of_squares(x)
    fused.sum_of_squares_backward(squares, x)
    for mean_square in (None, squares):
        y, used = fused.forward(x, x, weight, mean_square, 1e-6)
        fused.backward(y, x, x, weight, used, 1e-6, mean_square is None)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels for an absent card.")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--only", default="", help="calls whose name has this in it")
    args = parser.parse_args()
    shape = (args.tokens, args.heads, args.head_dim, DTYPES[args.dtype])
    calls = {
        "lightning attention": lambda: lightning(*shape, silu=False),
        "lightning attention, SiLU inside": lambda: lightning(*shape, silu=True),
        "lightning decode": lambda: decode(*shape[1:]),
        "gated norm": lambda: gated_norm(args.tokens, args.heads * args.head_dim, shape[-1]),
    }
    for title, call in calls.items():
        if args.only not in title:
            continue
        print(
            f"\n{title}\n{'kernel':24}{'warps':>6}{'stages':>7}{'shared':>9}{'regs':>6}{'spill':>7}"
        )
        with compiling(args.capability) as kernels:
            call()
        for kernel in kernels:
            c = examine(kernel, args.capability)
            print(
                f"{c.name:24}{c.warps:6}{c.stages:7}{c.shared_bytes:9}{c.registers:6}"
                f"{c.spilled_bytes:7}"
            )


if __name__ == "__main__":
    main()
