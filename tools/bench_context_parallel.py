"""What context parallelism costs and buys: bytes, memory and time of one attention layer.

    python tools/bench_context_parallel.py [--cp 1 2 4] [--tokens 16384] [--row one|skewed]
        [--cut balanced|contiguous|zigzag] [--heads 8 --groups 2 --width 64] [--steps 3]
        [--out FILE.json]

First the balance of the cuts: softmax work of the busiest rank over the mean, for many rows their
mean and worst. Then for each number of gloo processes one layer forward and backward, in FP32:

    ring      keys and values to the ranks that need them      parallel/varlen_ring.py
    gather    keys and values to all ranks                     parallel/gathered_attention.py
    LASP+     one all-gather of lightning states               parallel/lasp.py
    LASP-1    lightning states from rank to rank               parallel/lasp_ring.py

Bytes are counted where tensors are handed to torch.distributed, those of the busiest rank are
printed, and the run fails unless each rank's are, with R ranks, T tokens, H heads, K key/value
heads of width D, and 4 bytes a number:

    ring      forward 4 * 2KD * sent; backward the same and 4 * 2KD * seen, for the keys that this
              rank sends and sees of others
    gather    forward 4 * 2KD * (R-1) T/R; backward twice that
    LASP+     4 * HDD * (R-1) * S in each direction whatever T, S the most states that a rank sends
    LASP-1    4 * HDD * (states that this rank sends), in each direction

Memory is the peak above what the process held before its inputs were made. Processes share this
machine's cores: a time at R processes is not that of R machines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.cut import Cut
from parallel.exchange import Traffic, counted
from parallel.gathered_attention import gathered_attention
from parallel.lasp import Lasp, gather_states
from parallel.lasp_ring import pass_states
from parallel.layout import CUTS
from parallel.shard import Shard
from parallel.varlen_ring import ring_attention
from tools.memory import forget_peak, peak_bytes
from tools.ranks import on_ranks

FLOAT = 4


@dataclass(frozen=True)
class Case:
    """One layer on one row: T tokens with document borders `bounds`, H, K and D."""

    bounds: list[int]
    cut: str
    heads: int
    groups: int
    width: int
    steps: int


@dataclass
class Measurement:
    """A layer on one rank; bytes of one forward and one backward pass."""

    layer: str
    ranks: int
    sent_forward: int
    sent_backward: int
    peak_bytes: int
    seconds: list[float]


def layers(case: Case, shard: Shard) -> dict[str, tuple[Callable[..., Tensor], list[int]]]:
    """Each layer as a function of its inputs, and the heads of those."""
    group = dist.group.WORLD
    slopes = torch.logspace(0, -3, case.heads)

    def lasp(exchange: Any) -> Callable[..., Tensor]:
        return lambda *heads: Lasp.begin(
            *(x[None] for x in heads),
            decay=slopes,
            plan=shard.states,
            group=group,
            exchange=exchange,
        ).finish()[0]

    softmax, lightning = [case.heads, case.groups, case.groups], [case.heads] * 3
    return {
        "ring": (lambda *heads: ring_attention(*heads, shard.ring, group), softmax),
        "gather": (lambda *heads: gathered_attention(*heads, shard.cut, group), softmax),
        "LASP+": (lasp(gather_states), lightning),
        "LASP-1": (lasp(pass_states), lightning),
    }


def formulas(case: Case, shard: Shard) -> dict[str, tuple[int, int]]:
    """Bytes that this rank sends, forward and backward, as in this file's first lines."""
    others = shard.cut.ranks - 1
    key, state = FLOAT * 2 * case.groups * case.width, FLOAT * case.heads * case.width**2
    sent = sum(step.sent for step in shard.ring.steps)
    seen = sum(step.incoming for step in shard.ring.steps)
    whole = others * shard.cut.local_tokens
    forward, backward = shard.states.forward, shard.states.backward
    return {
        "ring": (key * sent, key * (sent + seen)),
        "gather": (key * whole, 2 * key * whole),
        "LASP+": (state * others * forward.slots, state * others * backward.slots),
        "LASP-1": (state * len(forward.sent), state * len(backward.sent)),
    }


def measure(case: Case) -> list[Measurement]:
    """Every layer on this rank, a gloo process among others. Collective."""
    # One of the calls has another name from torch 2.13 on.
    warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated.*")
    dist.init_process_group("gloo")
    try:
        shard = Shard(Cut.of(case.bounds, dist.get_world_size(), case.cut), dist.get_rank())
        return [_measure_layer(name, case, shard) for name in layers(case, shard)]
    finally:
        dist.destroy_process_group()


def _measure_layer(name: str, case: Case, shard: Shard) -> Measurement:
    attend, heads = layers(case, shard)[name]
    sizes = [(shard.cut.local_tokens, number, case.width) for number in heads]
    _passes(attend, sizes)  # what libraries take once is not the layer's
    # One pass alone: what it frees may stay with the process, and the next take other memory.
    held = forget_peak()
    forward, backward = _passes(attend, sizes)
    peak = peak_bytes() - held
    seconds = []
    for _ in range(case.steps):
        dist.barrier()
        started = time.perf_counter()
        _passes(attend, sizes)
        dist.barrier()
        seconds.append(time.perf_counter() - started)
    _check(name, (forward, backward), formulas(case, shard)[name])
    return Measurement(name, shard.cut.ranks, forward.bytes, backward.bytes, peak, seconds)


def _passes(
    attend: Callable[..., Tensor], sizes: list[tuple[int, int, int]]
) -> tuple[Traffic, Traffic]:
    """What a forward and a backward pass on inputs of these sizes send."""
    inputs = [torch.randn(size, requires_grad=True) for size in sizes]
    with counted() as forward:
        out = attend(*inputs)
    with counted() as backward:
        out.backward(torch.ones_like(out))
    return forward, backward


def _check(name: str, traffic: tuple[Traffic, Traffic], expected: tuple[int, int]) -> None:
    counted_bytes = tuple(one.bytes for one in traffic)
    if counted_bytes != expected:
        raise SystemExit(f"{name} sent {counted_bytes} bytes, its formula says {expected}")


def sampled_rows(tokens: int, samples: int) -> Iterator[tuple[str, list[list[int]]]]:
    """(what they are, document borders of `samples` rows)."""
    random = np.random.RandomState(0)

    def borders(lengths: Any) -> list[int]:
        ends = np.cumsum(np.maximum(np.asarray(lengths, dtype=np.int64), 1))
        return [0, *ends[ends < tokens].tolist(), tokens]

    def giant(share: float) -> list[int]:
        small = random.geometric(100 / tokens, size=tokens)
        small = small[np.cumsum(small) <= tokens * (1 - share)]
        place = random.randint(len(small) + 1)
        rest = tokens - int(small.sum())
        return [0, *accumulate([*small[:place].tolist(), rest, *small[place:].tolist()])]

    yield "one document", [[0, tokens]]
    for sigma in (1.0, 2.0):
        mean = np.log(tokens / 100)
        rows = [borders(random.lognormal(mean, sigma, size=tokens)) for _ in range(samples)]
        yield f"lognormal, sigma {sigma:.0f}", rows
    for share in (0.25, 0.5, 0.9):
        yield f"a giant of {share:.0%} among small", [giant(share) for _ in range(samples)]


def print_balance(tokens: int, sizes: list[int], samples: int = 30) -> None:
    print(f"softmax work of the busiest rank over the mean, rows of {tokens} tokens: mean (worst)")
    print(f"{'rows':<30}{'ranks':>6}" + "".join(f"{kind:>20}" for kind in CUTS))
    for name, rows in sampled_rows(tokens, samples):
        for ranks in sizes:
            found = [[Cut.of(row, ranks, kind).imbalance for row in rows] for kind in CUTS]
            columns = [f"{statistics.mean(one):.3f} ({max(one):.3f})" for one in found]
            print(f"{name:<30}{ranks:>6}" + "".join(f"{column:>20}" for column in columns))


def print_layers(found: list[list[Measurement]]) -> None:
    mebibyte = 2**20
    for per_rank in zip(*found, strict=True):
        sent = max(one.sent_forward + one.sent_backward for one in per_rank) / mebibyte
        peak = max(one.peak_bytes for one in per_rank) / mebibyte
        seconds = statistics.median(per_rank[0].seconds)
        layer, ranks = per_rank[0].layer, per_rank[0].ranks
        print(f"{layer:<10}{ranks:>4}{sent:>14.2f}{peak:>16.1f}{seconds:>12.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure context parallelism on this machine.")
    parser.add_argument("--cp", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--row", choices=["one", "skewed"], default="one")
    parser.add_argument("--cut", choices=CUTS, default=CUTS[0])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    print_balance(args.tokens, [ranks for ranks in args.cp if ranks > 1])
    rows = dict(sampled_rows(args.tokens, 1))
    (bounds,) = rows["one document" if args.row == "one" else "lognormal, sigma 2"]
    case = Case(bounds, args.cut, args.heads, args.groups, args.width, args.steps)
    print(
        f"\none layer, a row of {len(bounds) - 1} document(s), {args.cut} cut, forward and backward"
    )
    print(f"{'layer':<10}{'cp':>4}{'MiB sent':>14}{'peak MiB':>16}{'seconds':>12}")
    found = []
    for ranks in args.cp:
        found.append(on_ranks(ranks, measure, case))
        print_layers(found[-1])
    if args.out:
        report = [asdict(one) for ranks in found for rank in ranks for one in rank]
        args.out.write_text(json.dumps({"case": asdict(case), "measurements": report}, indent=1))


if __name__ == "__main__":
    main()
