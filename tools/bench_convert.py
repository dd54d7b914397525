"""Memory and speed of conversion, on a synthetic model in MiniMax's format.

    python tools/bench_convert.py --folder DISK/bench [--model m1_1b] [--workers 1] [--keep]

Writes random BF16 weights (FP32 routers) of a model of conf/model, imports them, exports the
checkpoint and compares both, each in a process of its own whose peak of resident memory is
reported. Needs three times the size of the weights on the disk, and removes them in the end.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml
from torch import Tensor

from megatron_m1.checkpoint.beside import json_bytes
from megatron_m1.conversion import hf_folder
from megatron_m1.conversion.families import MINIMAX_M1
from megatron_m1.conversion.safetensors_file import Form, SafetensorsWriter
from megatron_m1.model.config import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
_RANDOM = 1 << 24  # numbers that all tensors are cut from, each at another place


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    values = yaml.safe_load((ROOT / f"conf/model/{args.model}.yaml").read_text())
    model = ModelConfig(**values)
    source, checkpoint, back = (args.folder / name for name in ("source", "checkpoint", "back"))
    try:
        size = write_source(model, source)
        print(f"{args.model}: {model.num_params():,} parameters, {size / 1e9:.2f} GB")
        workers = ["--workers", str(args.workers)]
        for words in (
            ["import", "--hf", source, "--out", checkpoint, *workers],
            ["export", "--ckpt", checkpoint, "--hf", back, *workers],
            ["verify", "--ckpt", checkpoint, "--hf", back, *workers],
        ):
            seconds, peak = run([*map(str, words)])
            print(
                f"{words[0]:<8}{seconds:6.0f} s  {size / 1e6 / seconds:5.0f} MB/s  "
                f"peak {peak / 1e9:.2f} GB resident in one process",
                flush=True,
            )
    finally:
        if not args.keep:
            shutil.rmtree(args.folder, ignore_errors=True)


def write_source(model: ModelConfig, folder: Path) -> int:
    """A folder of safetensors with random weights; returns their bytes."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(_RANDOM, generator=generator).mul(0.02).to(torch.bfloat16)
    shards: dict[str, dict[str, Form]] = {}
    for name, form in forms(model):
        layer = re.search(r"layers\.(\d+)", name)
        shard = f"model-{int(layer[1]) + 1 if layer else 0:05d}.safetensors"
        shards.setdefault(shard, {})[name] = form
    for shard, tensors in shards.items():
        with SafetensorsWriter(folder / shard, tensors) as file:
            for name, form in tensors.items():
                file.put(name, random_tensor(numbers, form, len(name)))
    config = MINIMAX_M1.words.write(model, max_length=8192)
    config |= {"architectures": list(MINIMAX_M1.architectures), "torch_dtype": "bfloat16"}
    for name, content in (
        (hf_folder.INDEX, hf_folder.index_of(shards)),
        (hf_folder.CONFIG, config),
    ):
        (folder / name).write_bytes(json_bytes(content))
    return sum(form.size for tensors in shards.values() for form in tensors.values())


def forms(model: ModelConfig) -> Iterator[tuple[str, Form]]:
    for mapped in MINIMAX_M1.parameters(model).values():
        dtype = torch.float32 if mapped.is_router else torch.bfloat16
        yield from ((name, Form(dtype, shape)) for name, shape in mapped.theirs)


def random_tensor(numbers: Tensor, form: Form, place: int) -> Tensor:
    """The same numbers again and again, from another one on for each tensor."""
    count = torch.Size(form.shape).numel()
    shifted = numbers.roll(place * 7919 + count)
    repeated = shifted.repeat(-(-count // _RANDOM))[:count]
    return repeated.view(form.shape).to(form.dtype)


def run(words: list[str]) -> tuple[float, int]:
    """Seconds and the peak of resident bytes of a conversion command, its workers included."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "tools/convert_checkpoint.py", *words], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{words[0]} failed")
    return time.monotonic() - start, usage.ru_maxrss * 1024


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="a new folder on the disk to measure")
    add("--model", default="m1_1b", help="a name in conf/model; default: m1_1b")
    add("--workers", type=int, default=1)
    add("--keep", action="store_true", help="leave what was written")
    return parser


if __name__ == "__main__":
    main()
