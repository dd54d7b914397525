"""Convert weights between this project's checkpoints and folders of safetensors.

    python tools/convert_checkpoint.py import --hf MiniMax-M1-80k --out checkpoints/m1
    python tools/convert_checkpoint.py export --ckpt runs/rl --hf m1-rl --format minimax_m1
    python tools/convert_checkpoint.py verify --ckpt checkpoints/m1 --hf MiniMax-M1-80k
    python tools/convert_checkpoint.py inspect FOLDER

Formats: MiniMax's own (minimax_m1, minimax_text_01), transformers' MiniMaxForCausalLM by its names
on disk and in memory (transformers, transformers_memory), and this project's names and
configuration (megatron_m1). Import finds out which one it is. No GPU is needed, memory is bounded
by a few of the largest tensors, and a conversion that was killed goes on when its command is given
again. Code that comes with weights is never run, and pickled weights are not read.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_m1.errors import EXIT_STOPPED, InputError, UserError

if TYPE_CHECKING:
    from megatron_m1.conversion.convert import Job

FORMATS = ("minimax_m1", "minimax_text_01", "transformers", "transformers_memory", "megatron_m1")
DTYPES = ("stored", "bf16", "fp32")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; a user's error ends it with its sentence and exit code."""
    args = command_line().parse_args(arguments)
    try:
        sys.exit(args.run(args))
    except UserError as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(
            "convert_checkpoint: interrupted: the same command goes on with what is left",
            file=sys.stderr,
        )
        sys.exit(EXIT_STOPPED)


# Torch takes seconds to import; what the parser answers needs none of it.


def run_import(args: argparse.Namespace) -> int:
    """Safetensors into one of our checkpoints."""
    from megatron_m1.conversion.convert import convert
    from megatron_m1.conversion.inspection import as_text, check_complete, describe_folder
    from megatron_m1.conversion.jobs import import_job
    from megatron_m1.conversion.recognition import recognise

    given = recognise(args.hf, args.dry_run, args.ignore_config_keys)
    if args.dry_run:
        print(as_text(describe_folder(given)))
        check_complete(given)
        return 0
    if args.out is None:
        raise InputError("--out is missing: give the folder to write, or --dry-run to write none")
    job = import_job(given, args.out, args.dtype, args.shard_size)
    _say_done(convert(job, args.workers), job, args.out)
    return 0


def run_export(args: argparse.Namespace) -> int:
    """One of our checkpoints into safetensors."""
    from megatron_m1.checkpoint import lease
    from megatron_m1.conversion.convert import convert
    from megatron_m1.conversion.distributed_folder import check_files
    from megatron_m1.conversion.inspection import resolve
    from megatron_m1.conversion.jobs import ExportOptions, export_job

    options = ExportOptions(
        args.format, args.dtype, args.shard_size, args.permute_rope, args.like, args.max_length
    )
    path = resolve(args.ckpt)
    with lease.reading(path):
        check_files(path, is_full=args.check == "full")
        job = export_job(path, args.hf, options)
        _say_done(convert(job, args.workers), job, args.hf)
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Compare one of our checkpoints with a folder of safetensors; 1 where they differ."""
    from megatron_m1.checkpoint import lease
    from megatron_m1.conversion import logits, verification
    from megatron_m1.conversion.distributed_folder import check_files
    from megatron_m1.conversion.inspection import resolve
    from megatron_m1.conversion.recognition import checkpoint_weights, recognise

    path, given = resolve(args.ckpt), recognise(args.hf, ignore=args.ignore_config_keys)
    with lease.reading(path):
        check_files(path, is_full=args.check == "full")
        sides = verification.Sides(checkpoint_weights(path), given.weights)
        rows = (
            logits.given_tokens(args.tokens, given.model)
            if args.tokens
            else logits.some_tokens(given.model)
        )
        top = partial(logits.compare_logits, sides, path, given, rows)
        failed = False
        for rung in verification.climb(sides, given, args.workers, top):
            print(rung, flush=True)
            failed |= rung.outcome == verification.FAILED
    return int(failed)


def run_inspect(args: argparse.Namespace) -> int:
    """Say what a folder holds."""
    from megatron_m1.conversion.inspection import as_text, inspect

    report = inspect(args.folder, args.ignore_config_keys)
    print(json.dumps(report, indent=1) if args.json else as_text(report))
    return 0


def _say_done(resumed: int, job: Job, out: Path) -> None:
    from megatron_m1.checkpoint.disk import readable

    earlier = f", {resumed} of them from an earlier start" if resumed else ""
    files = f"{len(job.shards)} file{'s' if len(job.shards) > 1 else ''}"
    print(f"{out}: {readable(job.size)} of tensors in {files}{earlier}")


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", text.upper())
    unit = found and (found[2] if found[2] in ("", "B") else found[2].rstrip("B") + "B")
    size = int(float(found[1]) * _UNITS.get(unit or "", 1)) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a size: 5GB and 500MB are")
    return size


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def command_line() -> argparse.ArgumentParser:
    """Every command with its arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, help_text, example, add_arguments in (
        (
            "import",
            "safetensors into a checkpoint",
            "--hf MiniMax-M1-80k --out checkpoints/m1 --workers 4",
            _add_import,
        ),
        (
            "export",
            "a checkpoint into safetensors",
            "--ckpt runs/rl --hf m1-rl --format minimax_m1 --dtype bf16",
            _add_export,
        ),
        (
            "verify",
            "compare a checkpoint with safetensors: names, shapes, types, values, logits",
            "--ckpt checkpoints/m1 --hf MiniMax-M1-80k",
            _add_verify,
        ),
        ("inspect", "what a folder holds, of either kind", "MiniMax-M1-80k --json", _add_inspect),
    ):
        command = commands.add_parser(
            name,
            help=help_text,
            description=f"{help_text[0].upper()}{help_text[1:]}.",
            epilog=f"example: python tools/convert_checkpoint.py {name} {example}",
        )
        add_arguments(command)
    return parser


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_import)
    add = parser.add_argument
    _add_safetensors(parser)
    add("--out", type=Path, metavar="CKPT", help="a new folder for the checkpoint")
    add("--dry-run", action="store_true", help="check names, shapes and sizes; write nothing")
    _add_common(parser)
    _add_ignored(parser)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_export)
    add = parser.add_argument
    _add_checkpoint(parser)
    add("--hf", type=Path, required=True, metavar="DIR", help="a new folder for the safetensors")
    add(
        "--format",
        choices=FORMATS,
        default=FORMATS[0],
        help=f"names and configuration of the files (docs/checkpoints.md); default: {FORMATS[0]}",
    )
    add(
        "--like",
        type=Path,
        metavar="DIR",
        help="take tokenizer, generation files and lengths from this folder; default: those that "
        "the weights were once imported with",
    )
    add(
        "--max-length",
        type=_positive,
        metavar="N",
        help="max_position_embeddings of config.json; default: the original's",
    )
    add(
        "--permute-rope",
        action="store_true",
        help="write a partial rotation so that transformers' class computes it right",
    )
    _add_common(parser)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_verify)
    add = parser.add_argument
    _add_checkpoint(parser)
    _add_safetensors(parser)
    add(
        "--tokens",
        metavar="FILE",
        help=".npy or .jsonl of token ids for the logits; default: two rows of random tokens",
    )
    _add_workers(parser)
    _add_ignored(parser)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_inspect)
    add = parser.add_argument
    add("folder", type=Path, help="a checkpoint, a run, or a folder of safetensors or their index")
    add("--json", action="store_true", help="the same as JSON")
    _add_ignored(parser)


def _add_safetensors(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hf",
        type=Path,
        required=True,
        metavar="DIR",
        help="a folder with config.json and safetensors",
    )


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--ckpt",
        type=Path,
        required=True,
        help="a checkpoint; or a folder of them or a run, of which the latest is taken",
    )
    add(
        "--check",
        choices=("full", "sizes"),
        default="full",
        help="compare the checkpoint's files with its manifest: hashes (full, the default), or "
        "sizes alone",
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--dtype",
        choices=DTYPES,
        default=DTYPES[0],
        help="type of the weights; bf16 leaves the routers in FP32; default: stored, as they are",
    )
    add(
        "--shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="most bytes of a file, such as 500MB; default: 5GB",
    )
    _add_workers(parser)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=_positive,
        default=1,
        metavar="N",
        help="processes, each of which holds one parameter at a time; default: 1",
    )


def _add_ignored(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ignore-config-keys",
        nargs="+",
        default=(),
        metavar="KEY",
        help="keys of config.json that do not change what the model computes",
    )


if __name__ == "__main__":
    main()
