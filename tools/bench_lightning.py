"""Lightning attention: how right, how fast and how large, against others who compute it.

    python tools/bench_lightning.py [--lengths 4096 8192 16384 32768 65536] [--threads 2]
                                    [--seconds 3] [--compile] [--tune] [--out FILE.json]

First each of `tools/lightning_peers.py` that runs here is compared with the definition in float64.
Then forward, and forward with backward, are timed in turns; the fastest counts on a CPU, whose
speed drifts, and the median on a GPU. TFLOP/s count the matrix products of the chunked form with
C = 64 for all: 4 D (C + D) forward and 10 D (C + D) backward for a token of a head. "Roofline" is
the share of the bandwidth of a large copy, measured first, that the smallest traffic would take: q,
k, v and o forward; q, k, v, do, dq, dk and dv backward.

On a GPU the shapes are those of MiniMax-M1, on a CPU small ones in FP32. On a CPU memory is that of
a process of its own. `--tune` times launches of the fused kernel and lengths of its pieces instead,
to fill its table and to set its rule.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.nn.functional import silu

from kernels.lightning import lightning_attention, lightning_attention_qkv
from kernels.triton_runtime import INTERPRETED
from tools.bench_train import processor
from tools.lightning_peers import Chunked, Fla, HuggingFace, Ours, Peer, Shape
from tools.memory import bytes_added
from tools.timing import best_of, copy_bandwidth, rounds

CPU_LENGTHS = [4096, 8192, 16384, 32768, 65536]
GPU_LENGTHS = [8192, 32768, 131072]
CHUNK = 64
FORWARD, BACKWARD = "forward", "forward + backward"
FORWARD_TENSORS, BACKWARD_TENSORS = 4, 7
LARGEST_ERROR = {torch.float32: 5e-6, torch.bfloat16: 1e-2}
BY_RULE = "pieces by the rule"
PACKAGES = ("torch", "transformers", "triton", "flash-linear-attention")


@dataclass
class Timing:
    """All rounds of one call, in seconds."""

    shape: str
    peer: str
    what: str
    seconds: list[float]
    tflop: float
    """Work that is counted, in TFLOP."""
    roofline_seconds: float


def truth(qkv: list[Tensor], decay: Tensor, bounds: Sequence[int]) -> Tensor:
    """`[B, T, H, D]` in float64 by the definition: all scores of every document, decayed."""
    outputs = []
    for begin, end in pairwise(bounds):
        step = torch.arange(end - begin, device=decay.device)
        distance = step[:, None] - step
        weight = torch.exp(-decay.double()[:, None, None] * distance.clamp(min=0)).tril()
        q, k, v = (x[:, begin:end].transpose(1, 2) for x in qkv)
        outputs.append((q @ k.mT * weight @ v).transpose(1, 2))
    return torch.cat(outputs, dim=1)


def head_error(actual: Tensor, expected: Tensor, head_dim: int = 2) -> float:
    """The worst head's norm of the difference over its norm."""
    actual, expected = (
        x.detach().double().movedim(head_dim, 0).flatten(1) for x in (actual, expected)
    )
    return ((actual - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


def check(peers: list[Peer], shape: Shape, device: torch.device) -> dict[str, dict[str, float]]:
    """Print and return the errors of outputs and gradients, of all peers that run here.

    Raises SystemExit where one of ours is too large.
    """
    q, k, v, d_o = shape.inputs(device, 4)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    o = truth(wide, shape.decay(device), shape.bounds or (0, shape.tokens))
    names = ("o", "dq", "dk", "dv")
    expected = dict(zip(names, (o, *torch.autograd.grad(o, wide, d_o.double())), strict=True))
    print(f"\nWorst head against float64, {shape}")
    errors = {}
    for peer in peers:
        if peer.refuses(shape, device):
            continue
        try:
            leaves = peer.leaves(q, k, v)
            o = peer.prepare(shape, device)(*leaves)
            actual = (o, *peer.gradients(torch.autograd.grad(o, leaves, d_o)))
        except Exception as error:
            if isinstance(peer, Ours):
                raise
            # Others may not fit this card or these versions: no reason to measure nothing.
            reason = str(error).partition("\n")[0]
            print(f"  {peer.name:14} {type(error).__name__}: {reason}")
            continue
        found = {n: head_error(a, expected[n]) for n, a in zip(names, actual, strict=True)}
        print(f"  {peer.name:14}", *(f"{name} {error:.1e}" for name, error in found.items()))
        errors[peer.name] = found
        if isinstance(peer, Ours) and not max(found.values()) < LARGEST_ERROR[shape.dtype]:
            raise SystemExit(f"{peer.name} is wrong for {shape}")
    return errors


def check_states(shape: Shape, device: torch.device) -> float:
    """Print and return the worst head's error of the states after the documents of a packed row.

    They start from random ones. Raises SystemExit where it is too large.
    """
    q, k, v = shape.inputs(device)
    bounds, decay = shape.bounds or (0, shape.tokens), shape.decay(device)
    initial = torch.randn(len(bounds) - 1, *q.shape[2:], shape.width, device=device)
    _, final = lightning_attention(
        q,
        k,
        v,
        decay,
        cu_seqlens=shape.cu_seqlens(device),
        initial_state=initial,
        return_final_state=True,
    )
    error = 0.0
    for (begin, end), before, after in zip(pairwise(bounds), initial, final, strict=True):
        ahead = torch.arange(end - begin, -1, -1, device=device)[:, None]
        weight = torch.exp(-decay.double() * ahead)
        k_, v_ = (x[0, begin:end].double() for x in (k, v))
        expected = torch.einsum("th,thd,thv->hdv", weight[1:], k_, v_)
        expected += weight[0, :, None, None] * before
        error = max(error, head_error(after, expected, 0))
    print(f"  {'final state':14} {error:.1e}")
    if not error < LARGEST_ERROR[shape.dtype]:
        raise SystemExit(f"final states are wrong for {shape}")
    return error


def timings(
    peers: list[Peer], shape: Shape, device: torch.device, bandwidth: float, seconds: float
) -> list[Timing]:
    """Forward, and forward with backward, of all peers that take `shape`."""
    q, k, v, d_o = shape.inputs(device, 4)
    forwards: dict[str, Callable[[], object]] = {}
    backwards: dict[str, Callable[[], object]] = {}
    for peer in peers:
        if peer.refuses(shape, device) is None:
            call, leaves = peer.prepare(shape, device), peer.leaves(q, k, v)
            forwards[peer.name] = without_gradients(call, leaves)
            backwards[peer.name] = with_gradients(call, leaves, d_o)
    tokens = shape.batch * shape.tokens * shape.heads
    found = []
    for what, calls, products, tensors in (
        (FORWARD, forwards, 4, FORWARD_TENSORS),
        (BACKWARD, backwards, 14, FORWARD_TENSORS + BACKWARD_TENSORS),
    ):
        tflop = products * shape.width * (CHUNK + shape.width) * tokens / 1e12
        roofline = tensors * tokens * shape.width * q.element_size() / bandwidth
        for name, measured in rounds(calls, device, seconds / 2).items():
            found.append(Timing(str(shape), name, what, measured, tflop, roofline))
    return found


def without_gradients(call: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    def forward() -> Tensor:
        with torch.no_grad():
            return call(*leaves)

    return forward


def with_gradients(
    call: Callable[..., Tensor], leaves: list[Tensor], d_o: Tensor
) -> Callable[[], object]:
    return lambda: torch.autograd.grad(call(*leaves), leaves, d_o)


def print_timings(found: list[Timing], shape: Shape, device: torch.device) -> None:
    """A line for each peer; the last column says how many times faster the first one is."""
    print(f"\n{shape}")
    print(f"  {'':19}{'':15}{'ms':>9}{'ns/token':>10}{'TFLOP/s':>9}{'roofline':>10}{'slower':>8}")
    tokens = shape.batch * shape.tokens
    for what in (FORWARD, BACKWARD):
        group = [timing for timing in found if timing.what == what]
        for timing in group:
            best = best_of(timing.seconds, device)
            print(
                f"  {what:19}{timing.peer:15}{best * 1e3:9.3f}{best / tokens * 1e9:10.0f}"
                f"{timing.tflop / best:9.3f}{timing.roofline_seconds / best:10.1%}"
                f"{best / best_of(group[0].seconds, device):7.2f}x"
            )


def fusions(shape: Shape, device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Print what SiLU inside, and one gradient instead of three, save in forward and backward."""
    qkv = torch.cat(shape.inputs(device), dim=-1).requires_grad_()
    (d_o,) = shape.inputs(device, 1)
    decay = shape.decay(device)

    def call(inside: bool, one: bool) -> Tensor:
        x = qkv if inside else silu(qkv)
        if one:
            o = lightning_attention_qkv(x, decay, silu=inside)
        else:
            q, k, v = x.chunk(3, dim=-1)
            o = lightning_attention(q, k, v, decay, silu=inside)
        return torch.autograd.grad(o, qkv, d_o)[0]

    calls = {
        f"SiLU {'inside' if inside else 'before'}, {'one gradient' if one else 'three and cat'}":
        partial(call, inside, one)
        for inside, one in itertools.product((True, False), repeat=2)
    }  # fmt: skip
    found = rounds(calls, device, seconds)
    print(f"\nForward + backward of one [B, T, H, 3 D], {shape}")
    best = {name: best_of(seconds, device) for name, seconds in found.items()}
    first = next(iter(best.values()))
    for name, time in best.items():
        print(f"  {name:30}{time * 1e3:9.3f} ms{time / first:7.2f}x")
    return found


def memory(peer: Peer, shape: Shape, device: torch.device) -> int:
    """Bytes that a forward and a backward add to their inputs at their peak, gradients included."""
    added = 0
    # The first only brings in what libraries take once.
    for size in (replace(shape, tokens=256), shape):
        q, k, v, d_o = size.inputs(device, 4)
        leaves = peer.leaves(q, k, v)
        del q, k, v
        added = bytes_added(with_gradients(peer.prepare(size, device), leaves, d_o), device)
    return added


def memory_of(peer: Peer, shape: Shape, device: torch.device, threads: int) -> int | None:
    """`memory`; on a CPU in a process of its own, None where it ran out on a GPU."""
    if device.type == "cuda":
        try:
            return memory(peer, shape, device)
        except torch.OutOfMemoryError:
            return None
    command = [sys.executable, __file__, "--memory-of", peer.name, "--threads", str(threads)]
    command += ["--lengths", str(shape.tokens)]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def print_memory(found: dict[str, list[int | None]], shapes: list[Shape]) -> None:
    print("\nMemory beyond the inputs, MiB")
    print(f"  {'tokens':14}", *(f"{shape.batch * shape.tokens:9d}" for shape in shapes))
    for name, row in found.items():
        cells = (f"{'':9}" if used is None else f"{used / 2**20:9.0f}" for used in row)
        print(f"  {name:14}", *cells)


def tune(shape: Shape, device: torch.device, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Print the fastest launches of the fused kernel and lengths of its pieces, and the places of
    those that it takes by itself.

    Returns all rounds of each, without and with SiLU.
    """
    from kernels.lightning import fused

    q, k, v, d_o = shape.inputs(device, 4)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    given = q, k, v, shape.decay(device), shape.cu_seqlens(device), None

    def call(inside: bool, config: fused.Config | None, piece: int | None) -> None:
        _, _, states = fused.forward(*given, False, inside, True, config, piece)
        gradients = dq, dk, dv
        fused.backward(d_o, None, *given, states, inside, *gradients, False, config, piece)

    tiles = [tile for tile in (16, 32, 64, 128) if tile <= shape.width]
    choices = itertools.product((32, 64, 128), tiles, (4, 8), (1, 2, 3))
    launches = {str(launch): launch for launch in itertools.starmap(fused.Config, choices)}
    # The last is longer than the row, which leaves documents whole.
    lengths = [2**power for power in range(7, shape.tokens.bit_length() + 1)]
    found = {}
    for inside in (False, True):
        what = f"Forward + backward, SiLU {'inside' if inside else 'before'}, {shape}"
        table = str(fused.config_for(shape.width, shape.width, shape.dtype, inside))
        calls: dict[str, Callable[[], None]] = {table: partial(call, inside, None, None)}
        calls |= {name: partial(call, inside, launch, None) for name, launch in launches.items()}
        by_launch = print_ranked(what, calls, table, device, seconds)
        calls = {BY_RULE: partial(call, inside, None, None)}
        calls |= {f"pieces of {length}": partial(call, inside, None, length) for length in lengths}
        by_piece = print_ranked(what, calls, BY_RULE, device, seconds)
        found["silu" if inside else "plain"] = by_launch | by_piece
    return found


def print_ranked(
    what: str,
    calls: dict[str, Callable[[], None]],
    chosen: str,
    device: torch.device,
    seconds: float,
) -> dict[str, list[float]]:
    """Print the fastest of `calls`, timed for `seconds` in all, and the place of `chosen`."""
    from triton.errors import TritonError

    # Of memory, registers, shared memory, or a pass of the compiler.
    refused = (TritonError, RuntimeError)
    timed = rounds(calls, device, seconds / len(calls), refused)
    ranked = sorted(timed, key=lambda name: best_of(timed[name], device))
    print(f"\n{what}")
    for place, name in enumerate(ranked, 1):
        if place <= 5 or name == chosen:
            mark = "  <- its own choice" if name == chosen else ""
            print(f"  {place:3}.{best_of(timed[name], device) * 1e3:9.3f} ms  {name}{mark}")
    return timed


def peers_for(device: torch.device, compiled: bool) -> list[Peer]:
    """Ours first, which the others are compared with."""
    ours: list[Peer] = [Ours("portable")]
    if device.type == "cuda":
        ours.insert(0, Ours("fused"))
    return [*ours, Fla(), HuggingFace(), Chunked(False), *([Chunked(True)] if compiled else [])]


def shapes_for(device: torch.device, lengths: list[int]) -> list[Shape]:
    """Layers of MiniMax-M1, whole and of a tensor-parallel rank; on a CPU, small ones."""
    if device.type != "cuda":
        rows = [Shape(1, T, 4, 64, torch.float32) for T in lengths]
        return [*rows, Shape(1, lengths[0], 4, 64, torch.float32, skewed(lengths[0]))]
    big = torch.bfloat16
    rows = [Shape(1, T, H, 128, big) for H in (8, 64) for T in lengths]
    packed = [Shape(1, 32768, H, 128, big, skewed(32768)) for H in (8, 64)]
    return [*rows, Shape(4, 4096, 64, 128, big), *packed]


def skewed(tokens: int) -> tuple[int, ...]:
    """Borders of one document of half the row, 16 of a quarter, and many of 40 tokens or none."""
    half, quarter = tokens // 2, tokens // 4
    middle = range(half, half + quarter, max(quarter // 16, 1))
    return 0, *middle, *range(half + quarter, tokens, 40), tokens, tokens


def check_all(peers: list[Peer], device: torch.device) -> dict[str, dict[str, dict[str, float]]]:
    """`check` of a plain and of a packed row."""
    gpu = device.type == "cuda"
    T, H, D, dtype = (2048, 8, 128, torch.bfloat16) if gpu else (1024, 4, 64, torch.float32)
    shapes = (Shape(1, T, H, D, dtype), Shape(1, T, H, D, dtype, skewed(T)))
    found = {str(shape): check(peers, shape, device) for shape in shapes}
    states = Shape(1, T, H, D, torch.float32, skewed(T))
    found["final states"] = {"auto": {"final_state": check_states(states, device)}}
    return found


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare ways to compute lightning attention.")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens in a row")
    parser.add_argument(
        "--threads", type=int, default=2, help="of the CPU; with 1 processor time is counted"
    )
    parser.add_argument("--seconds", type=float, default=3, help="for a peer at a shape")
    parser.add_argument("--compile", action="store_true", help="on a CPU, torch.compile too")
    parser.add_argument("--tune", action="store_true", help="only try launches of the fused kernel")
    parser.add_argument("--out", type=Path, help="write all numbers here as JSON")
    parser.add_argument("--memory-of", metavar="PEER", help="print its bytes at a length, no more")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    lengths = args.lengths or (GPU_LENGTHS if gpu else CPU_LENGTHS)
    shapes = shapes_for(device, lengths)
    peers = peers_for(device, args.compile or gpu)
    if args.memory_of:
        print(memory({peer.name: peer for peer in peers}[args.memory_of], shapes[0], device))
        return
    report: dict[str, object] = {"machine": machine(device), "versions": versions()}
    print(*report.values(), sep="\n")
    if args.tune:
        if not gpu and not INTERPRETED:
            raise SystemExit("--tune needs a CUDA device")
        launches: list[object] = []
        report["launches"] = launches
        for shape in shapes:
            launches.append(tune(shape, device, args.seconds))
            save(report, args.out)
    else:
        errors = check_all(peers, device)
        report["errors"] = errors
        running = next(iter(errors.values()))
        report |= measure([p for p in peers if p.name in running], shapes, device, args)
        save(report, args.out)


def save(report: dict[str, object], out: Path | None) -> None:
    if out:
        out.write_text(json.dumps(report, indent=1))


def measure(
    peers: list[Peer], shapes: list[Shape], device: torch.device, args: argparse.Namespace
) -> dict[str, object]:
    """Print and return times, fusions and memory."""
    bandwidth = copy_bandwidth(device)
    print(f"\nA large copy reads and writes {bandwidth / 1e9:.1f} GB/s")
    times = []
    for shape in shapes:
        found = timings(peers, shape, device, bandwidth, args.seconds)
        print_timings(found, shape, device)
        times += [asdict(timing) for timing in found]
    fused = fusions(shapes[1 % len(shapes)], device, args.seconds)
    rows = [shape for shape in shapes if shape.bounds is None]
    used: dict[str, list[int | None]] = {}
    for peer in peers:
        if peer.refuses(rows[0], device) is None and peer.name != "compiled":
            used[peer.name] = [memory_of(peer, shape, device, args.threads) for shape in rows]
    print_memory(used, rows)
    return {"copy_bytes_per_second": bandwidth, "times": times, "fusions": fused, "memory": used}


if __name__ == "__main__":
    main()
