"""Speed and memory of one training step, ours against transformers' MiniMaxForCausalLM.

    python tools/bench_train.py [--seq-lengths 2048 8192] [--threads 2] [--dtype fp32|bf16]
                                [--steps 3] [--model KEY=VALUE ...] [--out FILE.json]

Both sides start from the same weights and take the same steps (forward, backward, gradient
clipping, AdamW) on the same tokens, each in a process of its own. bf16 means on our side a BF16
body with FP32 router, head and master weights, on theirs FP32 weights under autocast, as their
Trainer does.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml
from torch import Tensor

from megatron_m1.config import OptimConfig
from megatron_m1.model.config import ModelConfig
from parallel import host
from tools.machine import processor
from tools.memory import peak_bytes

SEED = 1
OPTIM = OptimConfig(lr=1e-4, distributed=False)
BENCH = ModelConfig(
    name="bench",
    hidden_size=256,
    head_dim=64,
    rotary_dim=64,
    ffn_hidden_size=512,
    vocab_size=8192,
    aux_loss_coef=0.0,
)
PACKAGES = ("torch", "megatron-core", "transformers")


@dataclass
class Measurement:
    """One side at one length."""

    side: str
    seq_length: int
    losses: list[float]
    step_seconds: list[float]
    peak_bytes: int
    library_bytes: int
    """What the process had taken before the model was built."""
    pieces: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return self.seq_length / statistics.median(self.step_seconds)

    @property
    def mebibytes(self) -> float:
        """Peak memory of model, optimizer and step."""
        return (self.peak_bytes - self.library_bytes) / 2**20


def ours(model: ModelConfig, dtype: str) -> tuple[torch.nn.Module, Callable[[Tensor], float]]:
    """(chunk, step): our model and one training step of it on a sequence of tokens."""
    from megatron.core import tensor_parallel

    from megatron_m1.model.build import build_chunks, sum_of_losses, wrap_for_training
    from megatron_m1.model.transformer_config import transformer_config
    from megatron_m1.training.optimizer import build_optimizer, set_learning_rate
    from parallel.layout import Layout
    from parallel.packing import PackedRow

    tensor_parallel.model_parallel_cuda_manual_seed(SEED)
    config = transformer_config(model, Layout(), precision=dtype)
    chunks = wrap_for_training(build_chunks(model, config, seed=SEED), config, OPTIM)
    optimizer = build_optimizer(chunks, OPTIM, dtype)
    set_learning_rate(optimizer, OPTIM.lr)
    (chunk,) = chunks

    def step(tokens: Tensor) -> float:
        row = PackedRow.from_documents([tokens])
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        loss = sum_of_losses(chunk, row) / row.loss_mask.sum()
        loss.backward()
        chunk.finish_grad_sync()
        optimizer.step()
        return loss.item()

    return chunk, step


def theirs(model: ModelConfig, dtype: str) -> tuple[torch.nn.Module, Callable[[Tensor], float]]:
    """(model, step) of transformers, in the fastest way that it offers on a CPU."""
    from transformers import MiniMaxForCausalLM

    from megatron_m1.model.init import initial_tensor
    from tools.hf_minimax import hf_config, in_checkpoint_names

    # Measured: the grouped product wins in FP32, the loop over experts under autocast.
    experts = "grouped_mm" if dtype == "fp32" else "eager"
    config = hf_config(model, attn_implementation="sdpa", experts_implementation=experts)
    hf = MiniMaxForCausalLM(config)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            for part, view in in_checkpoint_names(name, parameter):
                view.copy_(initial_tensor(part, tuple(view.shape), model, SEED))
    decayed = [p for p in hf.parameters() if p.dim() > 1]
    others = [p for p in hf.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=OPTIM.lr,
        betas=tuple(OPTIM.betas),
        eps=OPTIM.eps,
        weight_decay=OPTIM.weight_decay,
        fused=True,
    )

    def step(tokens: Tensor) -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = hf(input_ids=tokens[None], labels=tokens[None]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), OPTIM.clip_grad)
        optimizer.step()
        return loss.item()

    return hf.train(), step


SIDES = {
    "ours": (ours, "megatron_m1.model.build"),
    "hf": (theirs, "transformers.models.minimax.modeling_minimax"),
}


def measure(side: str, model: ModelConfig, length: int, dtype: str, steps: int) -> Measurement:
    """Run one side in this process: a step to warm up, the timed ones, and ours once profiled."""
    host.enable()
    from megatron_m1.runtime import processes
    from parallel.layout import Layout
    from tools.pieces import time_by_piece

    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(model.vocab_size, (length,), generator=generator)
    build, library = SIDES[side]
    importlib.import_module(library)
    with processes(Layout()):
        library_bytes = peak_bytes()
        network, step = build(model, dtype)
        losses, seconds = [step(tokens)], []
        for _ in range(steps):
            started = time.perf_counter()
            losses.append(step(tokens))
            seconds.append(time.perf_counter() - started)
        found = Measurement(side, length, losses, seconds, peak_bytes(), library_bytes)
        if side == "ours":
            found.pieces = time_by_piece(network, lambda: step(tokens))
    return found


def measure_apart(side: str, length: int, args: argparse.Namespace) -> Measurement:
    """``measure`` in a process of its own, for a peak of its own."""
    command = [sys.executable, __file__, "--side", side, "--seq-lengths", str(length)]
    command += ["--threads", str(args.threads), "--dtype", args.dtype, "--steps", str(args.steps)]
    command += ["--model", *args.model]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def print_pair(mine: Measurement, hf: Measurement) -> None:
    """The two sides at one length, and where our time goes."""
    print(f"\n{mine.seq_length} tokens{'':10}{'ours':>12}{'transformers':>14}{'ours / theirs':>15}")
    rows = (
        ("tokens/s", mine.tokens_per_second, hf.tokens_per_second, "14.0f"),
        ("fastest step, s", min(mine.step_seconds), min(hf.step_seconds), "14.3f"),
        ("memory, MiB", mine.mebibytes, hf.mebibytes, "14.0f"),
    )
    for label, ours_, theirs_, form in rows:
        print(f"{label:20}{ours_:{form}}{theirs_:{form}}{ours_ / theirs_:15.2f}")
    for label, index in (("first loss", 0), ("last loss", -1)):
        print(f"{label:20}{mine.losses[index]:14.5f}{hf.losses[index]:14.5f}")
    total = sum(mine.pieces.values())
    for piece, seconds in mine.pieces.items():
        print(f"  {piece:22}{seconds:8.3f} s{100 * seconds / total:6.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare training speed with transformers.")
    parser.add_argument("--seq-lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--model", nargs="*", default=[], metavar="KEY=VALUE", help="other sizes")
    parser.add_argument("--out", type=Path, help="write all numbers here as JSON")
    parser.add_argument("--side", choices=tuple(SIDES), help="measure one side, print JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = dict(pair.split("=", 1) for pair in args.model)
    model = replace(BENCH, **{key: yaml.safe_load(value) for key, value in sizes.items()})
    if args.side:
        found = measure(args.side, model, args.seq_lengths[0], args.dtype, args.steps)
        print(json.dumps(asdict(found)))
        return

    versions = {name: version(name) for name in PACKAGES}
    print(f"{processor()}, {args.threads} of {os.cpu_count()} threads, {args.dtype}, {versions}")
    found = []
    for length in args.seq_lengths:
        pair = [measure_apart(side, length, args) for side in SIDES]
        print_pair(*pair)
        found += pair
    if args.out:
        report = {"cpu": processor(), "threads": args.threads, "dtype": args.dtype}
        report |= {"versions": versions, "model": asdict(model)}
        report["measurements"] = [asdict(m) for m in found]
        args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
