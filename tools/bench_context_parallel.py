"""What context parallelism costs and buys: balance, bytes, memory and time of one attention layer.

    python tools/bench_context_parallel.py [--cp 1 2 4] [--tokens 16384] [--row one|skewed]
        [--cut balanced contiguous zigzag] [--layers ring gather LASP+ LASP-1]
        [--heads 8 --groups 2 --width 64] [--steps 3] [--out FILE.json]

First the balance of the cuts: softmax work of the busiest rank over the mean, for many rows their
mean and worst. Then for each number of gloo processes and each cut, one layer forward and backward
in FP32, on one document or on many of skewed lengths (lognormal, and one of half the row):

    ring      keys and values to the ranks that need them      parallel/varlen_ring.py
    gather    keys and values to all ranks                     parallel/gathered_attention.py
    LASP+     one all-gather of lightning states               parallel/lasp.py
    LASP-1    lightning states from rank to rank               parallel/lasp_ring.py

With R ranks, T tokens, H heads, K key/value heads of width D, and 4 bytes a number, the run fails
unless on each rank what is sent equals, and what is kept lies within, the formulas:

    sent      counted where tensors are handed to torch.distributed, on any row
    ring      forward 4 * 2KD * sent; backward the same and 4 * 2KD * seen, for the keys that this
              rank sends and sees of others: a step without any has no message
    gather    forward 4 * 2KD * (R-1) T/R; backward twice that
    LASP+     4 * HDD * (R-1) * S in each direction whatever T, S the most states that a rank sends;
              nothing where no document is cut
    LASP-1    4 * HDD * (states that this rank sends), in each direction

    kept      tensors that live from the forward to the backward pass: the output, and what the
              layer saves, its inputs with it; all in proportion to the rank's part of the row
    softmax   4 * (2HD + 2KD + H) T/R
    lightning 4 * 4HD T/R, and at most a state 4 * HDD for 256 tokens and two for a stretch

    peak      tensors at most, in the backward pass; less what is kept it is at least
    softmax   4 * (2HD + 2KD) T/R for the gradients of output, q, k and v; with R > 1 also up to six
              messages of 4 * 2KD numbers a key on their way in and out, and one part's gradients
    lightning 4 * 4HD T/R; scratch memory of the kernel, the same for any T, R

The busiest rank's numbers are printed. `process` is what its resident memory grows by at most, with
buffers of gloo and what the allocator does not give back; `work` is the softmax work of the busiest
rank over the mean (lightning's is its tokens), `CPU s` its processor's time, and `seconds` those
until all are done: processes share this machine's cores, so they are not those of R machines.
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
from torch.autograd.graph import saved_tensors_hooks

from parallel.cut import Cut
from parallel.exchange import counted
from parallel.gathered_attention import gathered_attention
from parallel.lasp import Lasp, gather_states
from parallel.lasp_ring import pass_states
from parallel.layout import CUTS
from parallel.shard import Shard
from parallel.varlen_ring import ring_attention
from tools.memory import forget_peak, peak_bytes, tensors_counted
from tools.ranks import on_ranks

FLOAT = 4
LAYERS = ("ring", "gather", "LASP+", "LASP-1")
SOFTMAX = ("ring", "gather")


class Mismatch(Exception):
    """A rank measured what its formula does not say."""


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
    """A layer on one rank, one forward and one backward pass: bytes sent, of tensors kept between
    the two and at the peak, and of the process at its peak; time until all ranks are done, and of
    this rank's processor."""

    layer: str
    cut: str
    ranks: int
    imbalance: float
    sent_forward: int
    sent_backward: int
    kept_bytes: int
    peak_bytes: int
    process_bytes: int
    seconds: list[float]
    cpu_seconds: list[float]


def layers(case: Case, shard: Shard) -> dict[str, tuple[Callable[..., Tensor], list[int]]]:
    """Each layer as a function of its inputs, and the heads of those."""
    group = dist.group.WORLD
    slopes = torch.logspace(0, -3, case.heads)

    def lasp(exchange: Any) -> Callable[..., Tensor]:
        def attend(*heads: Tensor) -> Tensor:
            row = [x[None] for x in heads]
            under_way = Lasp.begin(
                *row, decay=slopes, plan=shard.states, group=group, exchange=exchange
            )
            return under_way.finish().squeeze(0)

        return attend

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


def kept_bounds(name: str, case: Case, shard: Shard) -> tuple[int, int]:
    """The fewest and the most bytes that this rank may keep, as in this file's first lines."""
    tokens, width, state = shard.cut.local_tokens, case.width, FLOAT * case.heads * case.width**2
    if name in SOFTMAX:
        kept = FLOAT * tokens * (2 * width * (case.heads + case.groups) + case.heads)
        return kept, kept
    kept = FLOAT * tokens * 4 * case.heads * width
    return kept, kept + state * (tokens // 256 + 2 * len(shard.states.stretches))


def measure(cases: list[Case], names: list[str]) -> list[Measurement]:
    """Layers on this rank, a gloo process among others. Collective."""
    # One of the calls has another name from torch 2.13 on.
    warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated.*")
    dist.init_process_group("gloo")
    try:
        return [_measure_layer(name, case) for case in cases for name in names]
    finally:
        dist.destroy_process_group()


def _measure_layer(name: str, case: Case) -> Measurement:
    ranks = dist.get_world_size()
    # What libraries take once is not the layer's.
    _passes(name, case, _shard([0, 64 * ranks], case.cut))
    shard = _shard(case.bounds, case.cut)
    # One pass alone: what it frees may stay with the process, and the next take other memory.
    held = forget_peak()
    sent, kept, peak = _passes(name, case, shard)
    process = peak_bytes() - held
    _check(f"{name} sent", sent, formulas(case, shard)[name])
    fewest, most = kept_bounds(name, case, shard)
    if not fewest <= kept <= most:
        raise Mismatch(f"{name} kept {kept} bytes, its formula says {fewest} to {most}")
    imbalance = shard.cut.imbalance if name in SOFTMAX else 1.0
    times = [_time(name, case, shard) for _ in range(case.steps)]
    return Measurement(
        name,
        case.cut,
        ranks,
        imbalance,
        *sent,
        kept,
        peak,
        process,
        seconds=[wall for wall, _ in times],
        cpu_seconds=[cpu for _, cpu in times],
    )


def _shard(bounds: list[int], cut: str) -> Shard:
    return Shard(Cut.of(bounds, dist.get_world_size(), cut), dist.get_rank())


def _inputs(name: str, case: Case, shard: Shard) -> tuple[Callable[..., Tensor], list[Tensor]]:
    attend, heads = layers(case, shard)[name]
    sizes = [(shard.cut.local_tokens, number, case.width) for number in heads]
    return attend, [torch.randn(size, requires_grad=True) for size in sizes]


def _passes(name: str, case: Case, shard: Shard) -> tuple[tuple[int, int], int, int]:
    """Bytes that a forward and a backward pass send, those of the tensors kept between them, and
    of all tensors at the peak."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    attend, inputs = _inputs(name, case, shard)
    with counted() as forward, saved_tensors_hooks(keep, lambda tensor: tensor):
        out = attend(*inputs)
    keep(out)
    with counted() as backward, tensors_counted() as made:
        out.backward(torch.ones_like(out))
    held = sum(kept.values())
    return (forward.bytes, backward.bytes), held, held + made.peak


def _time(name: str, case: Case, shard: Shard) -> tuple[float, float]:
    """Seconds until all ranks are done, and of this rank's processor."""
    attend, inputs = _inputs(name, case, shard)
    dist.barrier()
    started, began = time.perf_counter(), time.thread_time()
    out = attend(*inputs)
    out.backward(torch.ones_like(out))
    worked = time.thread_time() - began
    dist.barrier()
    return time.perf_counter() - started, worked


def _check(what: str, found: tuple[int, int], expected: tuple[int, int]) -> None:
    if found != expected:
        raise Mismatch(f"{what} {found} bytes, its formula says {expected}")


def skewed_row(tokens: int) -> list[int]:
    """Borders of documents of lognormal lengths, one of half the row somewhere among them."""
    random = np.random.RandomState(0)
    lengths = 1 + random.lognormal(np.log(tokens / 800), 2.0, size=tokens).astype(np.int64)
    small = lengths[np.cumsum(lengths) <= tokens - tokens // 2].tolist()
    place = random.randint(len(small) + 1)
    return [0, *accumulate([*small[:place], tokens - sum(small), *small[place:]])]


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


HEADER = (
    f"{'layer':<8}{'cut':<12}{'cp':>3}{'work':>8}{'MiB sent':>10}{'kept MiB':>10}{'peak MiB':>10}"
    f"{'process MiB':>13}{'CPU s':>8}{'seconds':>9}"
)


def print_layers(found: list[list[Measurement]]) -> None:
    """A line for each layer and cut, from what each rank measured."""
    for per_rank in zip(*found, strict=True):
        one = per_rank[0]
        sent, kept, peak, process = (
            max(sizes) / 2**20
            for sizes in zip(
                *(
                    (x.sent_forward + x.sent_backward, x.kept_bytes, x.peak_bytes, x.process_bytes)
                    for x in per_rank
                ),
                strict=True,
            )
        )
        worked = max(statistics.median(x.cpu_seconds) for x in per_rank)
        print(
            f"{one.layer:<8}{one.cut:<12}{one.ranks:>3}{one.imbalance:>8.3f}{sent:>10.2f}"
            f"{kept:>10.1f}{peak:>10.1f}{process:>13.1f}{worked:>8.2f}"
            f"{statistics.median(one.seconds):>9.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure context parallelism on this machine.")
    parser.add_argument("--cp", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--row", choices=["one", "skewed"], default="one")
    parser.add_argument("--cut", choices=CUTS, nargs="+", default=[CUTS[0]])
    parser.add_argument("--layers", choices=LAYERS, nargs="+", default=LAYERS)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    print_balance(args.tokens, [ranks for ranks in args.cp if ranks > 1])
    bounds = [0, args.tokens] if args.row == "one" else skewed_row(args.tokens)
    cases = [Case(bounds, cut, args.heads, args.groups, args.width, args.steps) for cut in args.cut]
    print(f"\none layer, a row of {len(bounds) - 1} document(s), forward and backward\n{HEADER}")
    found = []
    for ranks in args.cp:
        try:
            found.append(on_ranks(ranks, measure, cases, args.layers))
        except Mismatch as mismatch:
            raise SystemExit(str(mismatch)) from None
        print_layers(found[-1])
    if args.out:
        measurements = [asdict(one) for ranks in found for rank in ranks for one in rank]
        report = {"cases": [asdict(case) for case in cases], "measurements": measurements}
        args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
