"""Weights on their way to servers: names, what stays, and that they are those of the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megatron_m1.inference.load import load_model
from megatron_m1.model.build import build_chunks, unwrap
from megatron_m1.model.transformer_config import transformer_config
from megatron_m1.rl.rollout.config import HttpConfig
from megatron_m1.rl.rollout.publishing import Publisher
from parallel.layout import Layout
from tests.distributed import Pool
from tests.serving.served import MODEL, TOKENIZER


def publish(folder: Path, server: str) -> list[list[str]]:
    """Versions of two starts of a program, and what is in the folder after each."""
    Layout().build_groups()
    chunks = build_chunks(MODEL, transformer_config(MODEL, Layout()), seed=1)
    config = HttpConfig(server=server, max_length=128)
    seen = []
    for versions in ([0, 1, 2], [2, 2]):
        publisher = Publisher(config, folder, chunks, MODEL, TOKENIZER)
        for version in versions:
            published = publisher(version)
            assert Path(published.folder).name == published.name
            assert published.version == version
            seen.append(sorted(path.name for path in folder.iterdir()))
    if server == "megatron_m1":
        again = load_model(Path(published.folder), Layout(), "fp32").chunks
        for mine, read in zip(chunks[0].parameters(), again[0].parameters(), strict=True):
            assert torch.equal(mine, read)
    else:
        with safe_open(next(Path(published.folder).glob("*.safetensors")), "pt") as file:
            stored = file.get_tensor("lm_head.weight")
        assert torch.equal(stored, unwrap(chunks[0]).output_layer.weight)
    return seen


@pytest.mark.parametrize("server", ["megatron_m1", "transformers", "sglang"])
def test_the_last_two_stay(server: str, ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    (seen,) = ranks(1).run(publish, tmp_path, server)
    versions = [[name.split("-")[1] for name in names] for names in seen]
    # A new start takes nothing that was there before for its own.
    assert versions == [["0"], ["0", "1"], ["1", "2"], ["2"], ["2"]]
    assert set(seen[2]).isdisjoint(seen[3]) and seen[3] == seen[4]
    (folder,) = tmp_path.iterdir()
    assert (folder / "tokenizer.json").is_file()
    if server != "megatron_m1":
        described = json.loads((folder / "config.json").read_text())
        assert described["max_position_embeddings"] == 128
