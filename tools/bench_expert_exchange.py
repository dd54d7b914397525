"""One MoE layer with its exchange overlapped in parts, against Megatron's exchange in one piece.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tools/bench_expert_exchange.py
        [--ep 2] [--etp 1] [--parts 1 2 4] [--tokens 4096] [--steps 5] [--threads 1]

Prints for each number of parts the seconds of a forward and backward pass (on the clock, which
depends on what else the machine does, and of the processor) and the bytes that a rank sends to
others in it, counted at torch.distributed's all-to-all. One part is Megatron's own dispatcher; over
etp it also gathers and reduces, which is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from megatron_m1.model.config import ModelConfig
from parallel import host
from parallel.layout import Layout

MODEL = ModelConfig(hidden_size=512, ffn_hidden_size=1024, num_experts=8, num_layers=1)


@dataclass
class Measurement:
    """One number of parts; bytes_sent is this rank's, of one forward and backward pass."""

    parts: int
    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    bytes_sent: int = 0


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Bytes of each all-to-all that leave this rank."""
    found: list[int] = []
    plain = dist.all_to_all_single

    def counting(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        assert input_split_sizes is not None
        rows = sum(input_split_sizes) - input_split_sizes[dist.get_rank(group)]
        found.append(rows * input[:1].numel() * input.element_size())
        return plain(output, input, output_split_sizes, input_split_sizes, group, async_op)

    dist.all_to_all_single = counting
    try:
        yield found
    finally:
        dist.all_to_all_single = plain


def measure(
    layout: Layout, model: ModelConfig, tokens: int, parts: list[int], steps: int
) -> list[Measurement]:
    """Every number of parts in turn in each step, over the built groups."""
    from megatron.core import tensor_parallel

    from megatron_m1.model.moe import MoE
    from megatron_m1.model.transformer_config import transformer_config

    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    layers = []
    for number in parts:
        config = transformer_config(model, replace(layout, moe_overlap_groups=number))
        with host.device():
            layers.append(MoE(config))
        torch.manual_seed(dist.get_rank())
        for parameter in layers[-1].parameters():
            parameter.data.normal_(std=0.02)
    row = torch.randn(tokens, 1, model.hidden_size, device=host.device(), requires_grad=True)

    found = [Measurement(number) for number in parts]
    for step in range(steps + 1):
        for measurement, layer in zip(found, layers, strict=True):
            dist.barrier()
            torch.cuda.synchronize()
            started, worked = time.perf_counter(), time.process_time()
            with counted_bytes() as sent:
                output, _ = layer(row)
                output.square().sum().backward()
            torch.cuda.synchronize()
            measurement.bytes_sent = sum(sent)
            if step:
                measurement.seconds.append(time.perf_counter() - started)
                measurement.processor_seconds.append(time.process_time() - worked)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the overlapped exchange of experts.")
    parser.add_argument("--ep", type=int, default=2)
    parser.add_argument("--etp", type=int, default=1)
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=4096, help="of each rank")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    host.enable()
    from megatron_m1.runtime import processes

    layout = Layout(ep=args.ep, etp=args.etp)
    with processes(layout):
        found = measure(layout, MODEL, args.tokens, args.parts, args.steps)
        if dist.get_rank() == 0:
            for one in found:
                clock, work = one.seconds, one.processor_seconds
                print(
                    f"{one.parts} parts: {statistics.median(clock):.3f} s, fastest "
                    f"{min(clock):.3f} s, processor {statistics.median(work):.3f} s, "
                    f"{one.bytes_sent / 2**20:.2f} MiB sent"
                )


if __name__ == "__main__":
    main()
