"""What the precision of the LM head does where its logits are large.

    python tools/precision.py measure experiment=rl_tiny checkpoint.load=RUN_DIR [key=value]
                              [--sizes 0 16 64 256] [--prompts 64] --out FILE.json
    python tools/precision.py train experiment=rl_tiny checkpoint.load=RUN_DIR [key=value]
                              [--size 64]
    python tools/precision.py draw FILE.json [RUN_DIR ...] --out FILE.png

``measure`` compares the probabilities of drawn tokens, rollout against trainer, with BF16 and FP32
heads; ``train`` is ``megatron_m1.train_rl`` from weights with large logits; ``draw`` is the
figure of both. The logits are made large by a number that all tokens of the vocabulary share, which
no softmax sees: the policy is the same at every size, and only arithmetic differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence as Listed
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_m1.config_loading import load, report
from megatron_m1.errors import ConfigError, InputError, UserError
from megatron_m1.observe.run_log import read_run
from megatron_m1.rl.config import RLConfig
from megatron_m1.rl.config_checks import rl_problems
from tools.precision_figure import CORRELATION, DIFFERENCE, HEADS, Measured, draw_figure

if TYPE_CHECKING:
    from torch import nn

    from megatron_m1.attribution.passes import Texts


def add_common_logit(chunk: nn.Module, size: float) -> None:
    """Give all tokens of the vocabulary the same weight, ``size``, for one channel of the hidden
    states, whose share of the logits is then the same for all. It is the channel that told tokens
    apart least."""
    import torch

    from megatron_m1.model.build import unwrap

    model = unwrap(chunk)
    norm, head = model.decoder.final_layernorm.weight, model.output_layer.weight
    with torch.no_grad():
        # Rounded, so that heads of both precisions choose the same.
        spread = head.bfloat16().float().std(dim=0)
        channel = int((spread * norm.bfloat16().float().abs()).argmin())
        norm[channel] = 1.0
        head[:, channel] = size


def measure(config: RLConfig, sizes: Listed[float], prompts: int) -> list[Measured]:
    """Every pair of heads at every size, each with responses of its own to the same prompts."""
    from megatron_m1.config import LoadConfig
    from megatron_m1.inference.load import load_model, trained_model
    from parallel.layout import Layout

    found = []
    checkpoint, precision = LoadConfig(config.checkpoint.load, "sizes"), config.train.precision
    for rollout_head, trainer_head in HEADS:
        for size in sizes:
            with trained_model(checkpoint, Layout(), precision, rollout_head == "fp32") as rollout:
                trainer = load_model(rollout.path, Layout(), precision, trainer_head == "fp32")
                (ours,), (theirs,) = trainer.chunks, rollout.chunks
                for chunk in (ours, theirs):
                    add_common_logit(chunk, size)
                texts = _drawn(config, theirs, prompts)
                heads = f"{rollout_head}, {trainer_head}"
                found.append(_measured(heads, size, ours, texts, config.train.row_tokens))
            print(_line(found[-1]), flush=True)
    return found


def _drawn(config: RLConfig, chunk: nn.Module, prompts: int) -> Texts:
    """Groups of responses to the first prompts of a run."""
    from megatron_m1.attribution.passes import Texts
    from megatron_m1.inference.generation import Generator
    from megatron_m1.inference.requests import SamplingParams, Sequence
    from megatron_m1.rl.sources import open_prompts, open_tokenizer

    tokenizer, stream = open_tokenizer(config), open_prompts(config, config.seed)
    sampling = SamplingParams(max_new_tokens=config.rollout.max_new_tokens)
    sequences = [
        Sequence(
            tuple(tokenizer.encode(stream.prompt(number).text)),
            sampling,
            config.seed,
            number,
            index,
        )
        for number in range(prompts)
        for index in range(config.rl.group_size)
    ]
    generator = Generator([chunk], slots=config.rollout.slots, stop_token=tokenizer.eod)
    return Texts.drawn(generator, sequences)


def _measured(heads: str, size: float, chunk: nn.Module, texts: Texts, row_tokens: int) -> Measured:
    import torch

    from megatron_m1.attribution.passes import train
    from megatron_m1.attribution.recording import sites_of
    from megatron_m1.rl.mismatch import mismatch_metrics, mismatch_sums

    sites = sites_of(chunk)
    recording, logprobs = train(chunk, sites, texts, row_tokens)
    sums = mismatch_sums(texts.logprobs, logprobs, torch.ones_like(logprobs))
    logits = recording.outputs[len(sites) - 1][texts.predicting]
    return Measured(
        heads,
        size,
        float(logits.abs().amax(-1).float().mean()),
        mismatch_metrics(sums.metrics()),
        texts.logprobs.exp().tolist(),
        logprobs.exp().tolist(),
    )


def _line(found: Measured) -> str:
    return (
        f"heads {found.heads}, common logit {found.size:g} (largest {found.largest_logit:.0f}), "
        f"{len(found.rollout)} tokens: correlation {found.metrics[CORRELATION]:.6f}, mean "
        f"difference {found.metrics[DIFFERENCE]:.2e}, largest "
        f"{found.metrics['training/rollout_probs_diff_max']:.2e}"
    )


def train_with(config: RLConfig, size: float) -> None:
    """A run of RL that starts with a common logit."""
    from megatron_m1.rl.callbacks import default_callbacks
    from megatron_m1.rl.loop import train_rl
    from megatron_m1.rl.start import rl_run
    from megatron_m1.runtime import processes
    from megatron_m1.training.beginning import begin

    with processes(config.parallel), rl_run(config) as run:
        if begin(run):
            if run.progress.step == 0:
                add_common_logit(run.chunks[0], size)
                run.optimizer.reload_model_params()
            try:
                train_rl(run, default_callbacks(run))
            finally:
                run.sinks.close()


def draw(file: Path, runs: Listed[Path], out: Path) -> None:
    """The figure of ``measure``'s numbers, and of runs where some are given."""
    try:
        found = [Measured(**values) for values in json.loads(file.read_text())]
        draw_figure(found, [read_run(run) for run in runs], out)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{file} cannot be drawn to {out}: {error}") from error


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, or that of an error that is told in a sentence."""
    args = _arguments().parse_intermixed_args(argv)
    try:
        if args.action == "draw":
            draw(Path(args.what[0]), [Path(run) for run in args.what[1:]], args.out)
        elif args.action == "train":
            train_with(_config(args.what), args.size)
        else:
            found = measure(_config(args.what), args.sizes, args.prompts)
            args.out.write_text(json.dumps([asdict(one) for one in found]) + "\n")
    except OSError as error:
        return report(InputError(f"--out {args.out} cannot be written: {error.strerror}"))
    except UserError as error:
        return report(error)
    return 0


def _config(overrides: list[str]) -> RLConfig:
    config = load("train_rl", RLConfig, overrides)
    problems = rl_problems(config, 1)
    if not config.checkpoint.load:
        problems.append("checkpoint.load is missing: give checkpoint.load=FOLDER of a run")
    if problems:
        raise ConfigError(problems)
    # Torch and Megatron take seconds to import; what is answered above needs neither.
    from parallel import host

    host.enable()
    return config


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="What the precision of the LM head does.")
    parser.add_argument("action", choices=("measure", "train", "draw"))
    parser.add_argument("what", nargs="+", metavar="KEY=VALUE or FILE")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.0, 16.0, 64.0, 256.0])
    parser.add_argument("--size", type=float, default=0.0, help="of the run's common logit")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("precision.json"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
