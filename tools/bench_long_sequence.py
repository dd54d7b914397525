"""Memory and time of one training step of the tiny model on one long document.

    python tools/bench_long_sequence.py [--tokens 16384 32768 65536 131072] [--cp 2]
                                        [--compare-at 16384] [--out FILE.json]

Each length is one step of the training loop (forward, backward, clipping, AdamW) in FP32 on `--cp`
processes, each with its part of the row. Memory is the peak resident size of each process with its
libraries. At `--compare-at` the losses of two steps are compared with those of one process.
Processes share this machine's cores: a time at 2 processes is not that of 2 machines.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml

from megatron_m1.config import (
    CheckpointConfig,
    DataConfig,
    LoggerConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from megatron_m1.model.config import ModelConfig
from parallel import host
from parallel.layout import Layout
from tools.memory import peak_bytes
from tools.ranks import on_ranks

SEED = 1
CLOSE = 1e-5


@dataclass
class Measurement:
    """Steps on one rank; peak memory is that after the first."""

    tokens: int
    cp: int
    losses: list[float]
    seconds: list[float]
    peak_bytes: int


def config_of(tokens: int, cp: int, steps: int, folder: str) -> RunConfig:
    """The tiny model on rows that are one document each."""
    path = Path(__file__).resolve().parents[1] / "conf" / "model" / "tiny.yaml"
    return RunConfig(
        model=ModelConfig(**yaml.safe_load(path.read_text())),
        parallel=Layout(cp=cp),
        data=DataConfig(corpus="indexed", train=[f"{folder}/text"]),
        optim=OptimConfig(lr=1e-3),
        train=TrainConfig(
            steps=steps,
            global_batch=1,
            micro_batch=1,
            seq_length=tokens,
            precision="fp32",
            report=False,
        ),
        checkpoint=CheckpointConfig(),
        logger=LoggerConfig(console=False, wandb="disabled"),
        run_dir=folder,
    )


def write_documents(folder: str, tokens: int, number: int, vocabulary: int) -> None:
    """Documents of `tokens` random tokens and the one that the last of them is to predict."""
    from megatron_m1.data.indexed import IndexedWriter

    generator = torch.Generator().manual_seed(SEED)
    with IndexedWriter(Path(folder) / "text", vocabulary) as writer:
        for _ in range(number):
            writer.add(torch.randint(vocabulary, (tokens + 1,), generator=generator).numpy())


def measure(config: RunConfig) -> Measurement:
    """All steps of a run on this rank. Collective."""
    host.enable()
    from megatron_m1.runtime import processes
    from megatron_m1.training.run import build_run
    from megatron_m1.training.step import train_step

    losses, seconds, peaks = [], [], []
    with processes(config.parallel):
        run = build_run(config)
        while not run.finished:
            started = time.perf_counter()
            losses.append(train_step(run).loss)
            seconds.append(time.perf_counter() - started)
            peaks.append(peak_bytes())
    return Measurement(config.train.seq_length, config.parallel.cp, losses, seconds, peaks[0])


def over_processes(cp: int, tokens: int, steps: int = 1) -> list[Measurement]:
    """`measure` on each of `cp` new processes, in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(tokens, cp, steps, folder)
        write_documents(folder, tokens, steps, config.model.vocab_size)
        return on_ranks(cp, measure, config, threads=max((os.cpu_count() or 1) // cp, 1))


def compare(tokens: int, cp: int) -> None:
    """Stop unless one process sees the losses that `cp` processes see, over two steps."""
    one, *_ = over_processes(1, tokens, steps=2)
    several, *_ = over_processes(cp, tokens, steps=2)
    print(f"losses at {tokens} tokens: cp=1 {one.losses}, cp={cp} {several.losses}")
    if any(abs(a - b) > CLOSE * a for a, b in zip(one.losses, several.losses, strict=True)):
        raise SystemExit(f"the losses of cp=1 and cp={cp} differ by more than {CLOSE}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one step on one long document.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768, 65536, 131072])
    parser.add_argument("--cp", type=int, default=2)
    parser.add_argument("--compare-at", type=int, default=16384)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    host.enable()
    compare(args.compare_at, args.cp)
    print(f"{'tokens':>8}{'cp':>4}{'seconds':>9}{'peak MiB of each rank':>24}{'loss':>10}")
    found = []
    for tokens in args.tokens:
        ranks = over_processes(args.cp, tokens)
        peaks = " ".join(f"{one.peak_bytes / 2**20:.0f}" for one in ranks)
        took, loss = ranks[0].seconds[0], ranks[0].losses[0]
        print(f"{tokens:8}{args.cp:4}{took:9.1f}{peaks:>24}{loss:10.5f}", flush=True)
        found += ranks
    if args.out:
        args.out.write_text(json.dumps([asdict(one) for one in found], indent=1))


if __name__ == "__main__":
    main()
