"""Speed of generation, ours against transformers' MiniMaxForCausalLM.generate.

    python tools/bench_rollout.py [--prompts 512 8192] [--new-tokens 512] [--batch 16]
                                  [--threads 2] [--model KEY=VALUE ...] [--out FILE.json]

Both sides have the same weights in FP32, read the same prompts and take the most likely tokens,
each in a process of its own. Ours also gives the log-probability of every token. Reading the
prompts is timed by itself, with one new token; the rest of the time is decoding.
"""

from __future__ import annotations

import argparse
import json
import os
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
from torch import Tensor, nn

from megatron_m1.model.config import ModelConfig
from parallel import host
from tools.bench_train import BENCH, PACKAGES, SEED, processor

Generate = Callable[[Tensor, int], list[list[int]]]
"""From prompts [B, T] to so many new tokens of each."""


@dataclass
class Measurement:
    """One side at one prompt length."""

    side: str
    batch: int
    prompt: int
    new_tokens: int
    prompt_seconds: float
    total_seconds: float
    tokens: list[list[int]]
    pieces: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return self.batch * self.new_tokens / self.total_seconds

    @property
    def step_seconds(self) -> float:
        """Of decoding one token of each sequence."""
        return (self.total_seconds - self.prompt_seconds) / (self.new_tokens - 1)


def ours(model: ModelConfig, batch: int) -> tuple[nn.Module, Generate]:
    from megatron.core import tensor_parallel

    from megatron_m1.inference.generation import Generator
    from megatron_m1.inference.requests import SamplingParams, Sequence
    from megatron_m1.model.build import build_chunks
    from megatron_m1.model.transformer_config import transformer_config
    from parallel.layout import Layout

    tensor_parallel.model_parallel_cuda_manual_seed(SEED)
    chunks = build_chunks(model, transformer_config(model, Layout()), seed=SEED)
    generator = Generator(chunks, slots=batch)

    def generate(prompts: Tensor, new_tokens: int) -> list[list[int]]:
        sampling = SamplingParams(temperature=0, max_new_tokens=new_tokens)
        found = dict(generator.run([Sequence(tuple(row), sampling) for row in prompts.tolist()]))
        return [found[number].tokens for number in range(len(prompts))]

    return chunks[0], generate


def theirs(model: ModelConfig, batch: int) -> tuple[nn.Module, Generate]:
    """transformers in the fastest way that it offers on a CPU."""
    from transformers import MiniMaxForCausalLM

    from megatron_m1.model.init import initial_tensor
    from tools.hf_minimax import hf_config, in_checkpoint_names

    # Measured: the loop over experts wins for the few tokens of a step.
    config = hf_config(model, attn_implementation="sdpa", experts_implementation="eager")
    hf = MiniMaxForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            for part, view in in_checkpoint_names(name, parameter):
                view.copy_(initial_tensor(part, tuple(view.shape), model, SEED))

    def generate(prompts: Tensor, new_tokens: int) -> list[list[int]]:
        with host.as_it_is():
            found = hf.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                use_cache=True,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
            )
        return found[:, prompts.shape[1] :].tolist()

    return hf, generate


SIDES = {"ours": ours, "hf": theirs}


def measure(side: str, model: ModelConfig, batch: int, prompt: int, new_tokens: int) -> Measurement:
    """Run one side in this process, and ours once profiled."""
    host.enable()
    from megatron_m1.runtime import processes
    from parallel.layout import Layout

    generator = torch.Generator().manual_seed(SEED)
    prompts = torch.randint(model.vocab_size, (batch, prompt), generator=generator)
    with processes(Layout()):
        network, generate = SIDES[side](model, batch)
        generate(prompts[:, :64], 4)
        seconds = []
        for count in (1, new_tokens):
            started = time.perf_counter()
            tokens = generate(prompts, count)
            seconds.append(time.perf_counter() - started)
        found = Measurement(side, batch, prompt, new_tokens, *seconds, tokens)
        if side == "ours":
            found.pieces = step_by_piece(network, prompts)
    return found


def step_by_piece(network: nn.Module, prompts: Tensor) -> dict[str, float]:
    """Seconds of each piece of the model in one step of decoding, the mean of several."""
    from megatron_m1.inference.generation import Generation, Generator
    from megatron_m1.inference.requests import SamplingParams, Sequence
    from tools.pieces import time_by_piece

    sampling = SamplingParams(temperature=0, max_new_tokens=32)
    sequences = [Sequence(tuple(row), sampling) for row in prompts.tolist()]
    generation = Generation.of(Generator([network], slots=len(prompts)), sequences)
    while not generation.is_decoding:
        generation.step()
    steps = 10

    def decode() -> None:
        for _ in range(steps):
            generation.step()

    pieces = time_by_piece(network, decode)
    pieces["sampling, accounts"] = pieces.pop("gradients, update")
    return {piece: seconds / steps for piece, seconds in pieces.items()}


def measure_apart(side: str, prompt: int, args: argparse.Namespace) -> Measurement:
    """``measure`` in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--prompts", str(prompt)]
    command += ["--new-tokens", str(args.new_tokens), "--batch", str(args.batch)]
    command += ["--threads", str(args.threads), "--model", *args.model]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def print_pair(mine: Measurement, hf: Measurement) -> None:
    """The two sides at one length, and where our time goes."""
    title = f"{mine.new_tokens} tokens after {mine.prompt}"
    print(f"\n{title:26}{'ours':>12}{'transformers':>14}{'ours / theirs':>15}")
    for label, a, b, form in (
        ("tokens/s, with prompts", mine.tokens_per_second, hf.tokens_per_second, ".0f"),
        ("prompts, s", mine.prompt_seconds, hf.prompt_seconds, ".2f"),
        ("a step of decoding, ms", mine.step_seconds * 1e3, hf.step_seconds * 1e3, ".2f"),
    ):
        print(f"{label:26}{a:12{form}}{b:14{form}}{a / b:15.2f}")
    equal = sum(a == b for a, b in zip(mine.tokens, hf.tokens, strict=True))
    print(f"equal responses           {equal} of {mine.batch}")
    for piece, seconds in mine.pieces.items():
        print(f"  {piece:24}{seconds * 1e3:12.2f} ms a step")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare generation speed with transformers.")
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 8192], help="lengths")
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", nargs="*", default=[], metavar="KEY=VALUE", help="other sizes")
    parser.add_argument("--out", type=Path, help="write all numbers here as JSON")
    parser.add_argument("--side", choices=tuple(SIDES), help="measure one side, print JSON")
    args = parser.parse_args()
    if args.new_tokens < 2:
        parser.error(f"--new-tokens {args.new_tokens} leaves nothing to decode: give 2 or more")
    torch.set_num_threads(args.threads)
    sizes = dict(pair.split("=", 1) for pair in args.model)
    model = replace(BENCH, **{key: yaml.safe_load(value) for key, value in sizes.items()})
    if args.side:
        found = measure(args.side, model, args.batch, args.prompts[0], args.new_tokens)
        print(json.dumps(asdict(found)))
        return

    versions = {name: version(name) for name in PACKAGES}
    print(f"{processor()}, {args.threads} of {os.cpu_count()} threads, fp32, {versions}")
    measurements = []
    for prompt in args.prompts:
        pair = [measure_apart(side, prompt, args) for side in SIDES]
        print_pair(*pair)
        measurements += pair
    if args.out:
        report = {"cpu": processor(), "threads": args.threads, "versions": versions}
        report |= {"model": asdict(model), "measurements": [asdict(m) for m in measurements]}
        args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
