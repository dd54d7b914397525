"""The ladder: each rung holds, and each breaks where it should."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_m1.conversion import logits
from megatron_m1.conversion.inspection import inspect
from megatron_m1.conversion.logits import compare_logits, some_tokens
from megatron_m1.conversion.recognition import checkpoint_weights, recognise
from megatron_m1.conversion.verification import Rung, Sides, climb
from parallel.layout import Layout
from tests.conversion.foreign import (
    export_checkpoint,
    import_folder,
    transformers_model,
    write_toy,
)


@pytest.fixture(autouse=True)
def joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where logits are computed, this process is in its groups already."""
    monkeypatch.setattr(logits, "_one_process", nullcontext)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    return import_folder(write_toy(folder / "toy"), folder / "checkpoint")


@pytest.fixture
def folder(imported: Path, tmp_path: Path) -> Path:
    return export_checkpoint(imported, tmp_path / "hf", "minimax_m1")


def ladder(checkpoint: Path, folder: Path, workers: int = 1) -> dict[str, str]:
    """The text of each rung."""
    given = recognise(folder)
    sides = Sides(checkpoint_weights(checkpoint), given.weights)
    top = Rung("logits", "ok", "")
    return {rung.name: str(rung) for rung in climb(sides, given, workers, lambda: top)}


def change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Another tensor of this name, or none."""
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = folder / content["weight_map"][name]
    tensors = load_file(file)
    if tensor is None:
        del tensors[name]
        del content["weight_map"][name]
        index.write_text(json.dumps(content))
    else:
        tensors[name] = tensor
    save_file(tensors, file)


def weight(folder: Path, name: str) -> torch.Tensor:
    return recognise(folder).folder.read(name)


@pytest.mark.parametrize("workers", [1, 2])
def test_all_rungs_hold(workers: int, imported: Path, folder: Path) -> None:
    found = ladder(imported, folder, workers)
    assert list(found) == ["names", "shapes", "dtypes", "values", "logits"]
    assert found["names"] == "names   ok       61 parameters in 37 tensors here, 79 there"
    assert found["values"] == "values  ok       61 parameters equal bit for bit"


def test_a_missing_tensor(imported: Path, folder: Path) -> None:
    change(folder, "model.norm.weight", None)
    found = ladder(imported, folder)
    assert list(found) == ["names"]
    assert "FAILED   1 of 79 tensors are missing: model.norm.weight" in found["names"]


def test_another_model(imported: Path, folder: Path) -> None:
    config = folder / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "rope_theta": 5e5}))
    found = ladder(imported, folder)
    assert list(found) == ["names", "shapes"]
    assert "model.rope_theta=10000.0 here, 500000.0 there" in found["shapes"]


def test_one_bit(imported: Path, folder: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensor = weight(folder, name)
    tensor.view(torch.int32)[3, 4] ^= 1
    change(folder, name, tensor)
    found = ladder(imported, folder)
    assert list(found) == ["names", "shapes", "dtypes", "values"]
    assert (
        "FAILED   1 parameters differ: decoder.layers.1.mlp.experts.2.linear_fc1.weight"
        in (found["values"])
    )


def test_logits_that_do_not_fit_the_memory(
    imported: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recognise(folder)
    sides = Sides(checkpoint_weights(imported), given.weights)
    monkeypatch.setattr(logits.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    rung = compare_logits(sides, imported, given, some_tokens(given.model))
    assert str(rung) == "logits  skipped  the model needs 0.0 GB of memory in FP32, 0.0 are free"


def test_decays_of_another_model(imported: Path, tmp_path: Path) -> None:
    folder = export_checkpoint(imported, tmp_path / "native", "transformers")
    name = "model.layers.1.self_attn.slope_rate"
    change(folder, name, weight(folder, name) * 2)
    assert "1 of 12 stored decays are not MiniMax's" in ladder(imported, folder)["values"]


def test_a_model_that_transformers_stored_in_bf16(single_process: Layout, tmp_path: Path) -> None:
    """Rounded decays would give logits that neither side means."""
    folder = tmp_path / "toy"
    transformers_model().to(torch.bfloat16).save_pretrained(folder)
    checkpoint = import_folder(folder, tmp_path / "checkpoint")
    rung = top_rung(checkpoint, folder)
    assert rung.outcome == "ok", rung
    assert rung.text.endswith("with decays in FP32")


def test_other_types(imported: Path, tmp_path: Path) -> None:
    folder = export_checkpoint(imported, tmp_path / "bf16", "minimax_m1", "bf16")
    found = ladder(imported, folder)
    # All but the four routers.
    assert (
        "differ   57 of 61: embedding.word_embeddings.weight (float32 here, bfloat16 there)"
        in (found["dtypes"])
    )
    assert found["values"].endswith("equal where rounded alike")


@pytest.mark.parametrize("direction", ["narrower there", "wider there"])
def test_logits_of_other_types(
    direction: str, single_process: Layout, imported: Path, tmp_path: Path
) -> None:
    """Rounded alike, the same weights have the same logits."""
    folder = export_checkpoint(imported, tmp_path / "bf16", "minimax_m1", "bf16")
    checkpoint = imported
    if direction == "wider there":
        checkpoint = import_folder(folder, tmp_path / "checkpoint")
        folder = export_checkpoint(imported, tmp_path / "fp32", "minimax_m1")
    assert top_rung(checkpoint, folder).outcome == "ok"
    name = "model.layers.2.self_attn.out_proj.weight"
    change(folder, name, weight(folder, name).flip(0))
    rung = top_rung(checkpoint, folder)
    assert rung.outcome == "FAILED"
    assert rung.text.endswith("of weights rounded alike")


def top_rung(checkpoint: Path, folder: Path) -> Rung:
    given = recognise(folder)
    sides = Sides(checkpoint_weights(checkpoint), given.weights)
    return compare_logits(sides, checkpoint, given, some_tokens(given.model))


def test_inspection_of_both_sides(imported: Path, folder: Path) -> None:
    here, there = inspect(imported), inspect(folder)
    assert here["origin"] == "imported from transformers"
    assert there["format"] == "safetensors, minimax_m1 (MiniMaxM1ForCausalLM)"
    for report in (here, there):
        assert report["problems"] == "none"
        assert report["dtypes"] == "float32 100 %"
    assert here["model"].replace("minimax", "") == there["model"].replace("minimax_m1", "")
