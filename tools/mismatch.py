"""Where rollout and trainer part: the error that each module of a checkpoint's model adds.

    python tools/mismatch.py checkpoint.load=RUN_DIR tokens=prompts.jsonl [key=value] [--json FILE]

Draws responses with the native engine, runs the trainer's forward pass over the same tokens, and
compares the two after every module. The keys are in docs/configuration.md, what the numbers mean in
docs/precision.md. One process; all activations are held in memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_m1 import launcher
from megatron_m1.attribution.config import MismatchConfig, mismatch_problems
from megatron_m1.config_loading import load, report
from megatron_m1.errors import ConfigError, InputError, UserError
from parallel.layout import Layout

if TYPE_CHECKING:
    from megatron_m1.attribution.errors import Attribution


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, or that of an error that is told in a sentence."""
    parser = argparse.ArgumentParser(description="Compare rollout and trainer by module.")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every number here")
    args = parser.parse_intermixed_args(argv)
    try:
        run(load("mismatch", MismatchConfig, args.overrides), args.json)
    except UserError as error:
        return report(error)
    return 0


def run(config: MismatchConfig, json_file: Path | None) -> None:
    problems = mismatch_problems(config, launcher.world_size())
    if problems:
        raise ConfigError(problems)
    # Torch and Megatron take seconds to import; what is answered above needs neither.
    from parallel import host

    host.enable()
    from megatron_m1.attribution.text import as_json, describe

    found = _compared(config)
    print(describe(found))
    if json_file:
        try:
            json_file.write_text(json.dumps(as_json(found), indent=1) + "\n")
        except OSError as error:
            raise InputError(f"--json {json_file} cannot be written: {error.strerror}") from error


def _compared(config: MismatchConfig) -> Attribution:
    from megatron_m1.attribution.errors import attribute
    from megatron_m1.attribution.passes import Texts
    from megatron_m1.inference.generation import Generator
    from megatron_m1.inference.load import trained_model
    from megatron_m1.inference.requests import SamplingParams, Sequence
    from megatron_m1.inference.scoring import read_tokens

    sampling = SamplingParams(max_new_tokens=config.new_tokens)
    prompts = [
        Sequence(tuple(row.tolist()), sampling, config.seed, number)
        for number, row in enumerate(read_tokens(config.tokens))
    ]
    head = config.fp32_lm_head
    with trained_model(config.checkpoint, Layout(), config.precision, head) as loaded:
        generator = Generator(
            loaded.chunks,
            slots=config.slots,
            prefill_tokens=config.prefill_tokens,
            stop_token=config.stop_token,
        )
        try:
            texts = Texts.drawn(generator, prompts)
        except ValueError as error:
            raise InputError(f"tokens={config.tokens}: {error}") from error
        return attribute(generator, texts, config.row_tokens)


if __name__ == "__main__":
    sys.exit(main())
