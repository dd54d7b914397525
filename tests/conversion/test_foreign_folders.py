"""Folders of strangers: what is taken, and what is refused in one sentence."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron_m1.conversion import jobs, recognition
from megatron_m1.conversion.families import MINIMAX_M1
from megatron_m1.conversion.foreign_config import WITHOUT_EFFECT
from megatron_m1.conversion.hf_folder import open_folder
from megatron_m1.conversion.inspection import check_complete, describe_folder
from megatron_m1.conversion.safetensors_file import Form, SafetensorsWriter, read_header
from megatron_m1.errors import InputError
from megatron_m1.model.config import ModelConfig
from tests.conversion import released
from tests.conversion.foreign import (
    export_checkpoint,
    import_folder,
    tensors_of,
    transformers_model,
    write_toy,
)

CONF = Path(__file__).resolve().parents[2] / "conf/model/m1_456b.yaml"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in MiniMax's own format."""
    folder = tmp_path_factory.mktemp("source")
    checkpoint = import_folder(write_toy(folder / "toy"), folder / "checkpoint")
    return export_checkpoint(checkpoint, folder / "hf", "minimax_m1")


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """The same to spoil."""
    return Path(shutil.copytree(source, tmp_path / "hf"))


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refusal(folder: Path) -> str:
    """The sentence by which an import is refused."""
    with pytest.raises(InputError) as refused:
        jobs.import_job(recognition.recognise(folder), folder.parent / "out", "stored", 10**9)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_released_model_by_its_index_alone(tmp_path: Path) -> None:
    given = recognition.recognise(released.write_index(tmp_path / "m1"), without_shards=True)
    check_complete(given)
    report = describe_folder(given)
    assert report["problems"] == "none"
    assert report["tensors"] == "8,243 in 413 shards"
    assert report["total_size"] == "912,210,767,872 bytes"
    assert report["parameters"].startswith("456,089,655,296, 45,9")
    ours = ModelConfig(**yaml.safe_load(CONF.read_text()))
    sizes = {**asdict(given.model), "name": ours.name, "aux_loss_coef": ours.aux_loss_coef}
    assert sizes == asdict(ours)


def test_the_released_configuration_is_written_as_it_is_read(tmp_path: Path) -> None:
    given = recognition.recognise(released.write_index(tmp_path / "m1"), without_shards=True)
    written = MINIMAX_M1.words.write(given.model, max_length=10_240_000)
    assert written == {key: released.CONFIG[key] for key in written}
    assert released.CONFIG.keys() - written.keys() <= set(WITHOUT_EFFECT)


def test_an_index_of_other_bytes_is_refused(tmp_path: Path) -> None:
    folder = released.write_index(tmp_path / "m1")
    change_json(folder / INDEX, lambda index: index["metadata"].update(total_size=912_179_310_592))
    with pytest.raises(InputError, match="says total_size 912,179,310,592, but the model"):
        check_complete(recognition.recognise(folder, without_shards=True))


def test_the_library_reads_what_we_write_and_we_what_it_writes(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(3, 5),
        "half": torch.randn(7).to(torch.bfloat16),
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 4),
        "stacked": torch.arange(24).view(4, 2, 3),
    }
    save_file(tensors, tmp_path / "theirs.safetensors")
    stored = read_header(tmp_path / "theirs.safetensors")
    forms = {name: Form(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    assert {name: place.form for name, place in stored.items()} == forms
    with SafetensorsWriter(tmp_path / "ours.safetensors", forms) as writer:
        for name, tensor in tensors.items():
            assert torch.equal(stored[name].read(), tensor)
            for slot in range(4) if name == "stacked" else (None,):
                writer.put(name, stored[name].read(slot))
    for name, tensor in load_file(tmp_path / "ours.safetensors").items():
        assert torch.equal(tensor, tensors[name])


def test_pickled_weights_are_not_read(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert "holds its weights pickled (pytorch_model.bin)" in refusal(folder)
    (folder / "pytorch_model.bin").unlink()
    assert f"has neither {INDEX} nor model.safetensors" in refusal(folder)


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/model.safetensors", "a/../m.safetensors", "model.bin", 3]
)
def test_a_shard_cannot_be_elsewhere(shard: Any, folder: Path) -> None:
    shutil.copy(next(folder.glob("*.safetensors")), folder.parent / "model.safetensors")

    def change(index: dict[str, Any]) -> None:
        index["weight_map"]["lm_head.weight"] = shard

    change_json(folder / INDEX, change)
    assert f"puts lm_head.weight into {shard!r}" in refusal(folder)


def test_a_link_out_of_the_folder_is_refused(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    moved = folder.parent / "elsewhere.safetensors"
    shard.rename(moved)
    shard.symlink_to(moved)
    assert f"{shard} is a link out of its folder" in refusal(folder)


def test_a_tokenizer_out_of_the_folder_is_not_copied(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="tokenizer.json is a link out of its folder"):
        import_folder(folder, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_the_cache_of_downloads_is_a_folder_of_links(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "model/snapshots/abc", tmp_path / "model/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert recognition.recognise(snapshot).problems() == []


def test_missing_and_truncated_shards_are_named(folder: Path) -> None:
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    first.rename(folder.parent / first.name)
    assert refusal(folder).endswith(f"shards: {first.name}")
    (folder.parent / first.name).rename(first)
    second.write_bytes(second.read_bytes()[:-10])
    assert f"{second} is truncated or damaged" in refusal(folder)
    second.write_bytes(b"short")
    assert f"{second} is truncated or no safetensors file" in refusal(folder)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}, "not where its header says"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}, "not where its header says"),
        ({"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}, "not a whole number"),
        ({"dtype": "C64", "shape": [2], "data_offsets": [0, 16]}, "unknown dtype C64"),
        ({"dtype": "F32"}, "is not a safetensors file"),
        ([], "is not a safetensors file"),
    ],
)
def test_a_header_that_lies_is_refused(entry: Any, said: str, tmp_path: Path) -> None:
    header = json.dumps({"x": entry}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(InputError, match=said):
        read_header(file)


def test_a_header_without_an_end_is_refused(tmp_path: Path) -> None:
    header = b'{"x":' * 100_000
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(InputError, match="is not a safetensors file"):
        read_header(file)


def test_an_index_and_its_shards_must_agree(folder: Path) -> None:
    index = folder / INDEX
    before = index.read_text()
    change_json(index, lambda content: content["weight_map"].pop("lm_head.weight"))
    assert re.search("holds lm_head.weight, which .* does not put there", refusal(folder))
    index.write_text(before)
    shard = next(iter(json.loads(before)["weight_map"].values()))
    change_json(index, lambda content: content["weight_map"].update({"more": shard}))
    assert f"puts more into {shard}, which lacks it" in refusal(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    """The index names one of them, but the other may be the newer."""
    placed = json.loads((folder / INDEX).read_text())["weight_map"]
    first, second, *_ = sorted(set(placed.values()))
    name = next(name for name, shard in placed.items() if shard == first)
    twice = {**load_file(folder / second), name: load_file(folder / first)[name] + 1}
    save_file(twice, folder / second)
    assert f"{second} holds {name}, which {folder / INDEX} does not put there" in refusal(folder)


def test_a_total_size_that_is_no_number_says_nothing(folder: Path) -> None:
    change_json(folder / INDEX, lambda index: index["metadata"].update(total_size=float("nan")))
    assert open_folder(folder).total_size is None


def test_tensors_that_are_not_the_models_are_named(folder: Path) -> None:
    tensors = tensors_of(folder)
    (folder / INDEX).unlink()
    tensors["extra"] = tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors")
    said = refusal(folder)
    assert "1 of 79 tensors are missing: lm_head.weight" in said
    assert "1 tensors are not of this model: extra" in said
    tensors["lm_head.weight"] = tensors.pop("extra")[:-1].contiguous()
    save_file(tensors, folder / "model.safetensors")
    assert "lm_head.weight is [63, 32], the configuration says [64, 32]" in refusal(folder)
    tensors["lm_head.weight"] = torch.zeros(64, 32, dtype=torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    assert "quantised weights cannot be converted" in refusal(folder)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": (
        {"architectures": ["LlamaForCausalLM"]},
        "is of the architecture LlamaForCausalLM; known are MiniMaxM1ForCausalLM, Mini",
    ),
    "another kind": ({"architectures": None, "model_type": "bert"}, "is of the architecture bert"),
    "shared expert": ({"shared_intermediate_size": 64}, "shared_intermediate_size=64 is not what"),
    "pre-norm": ({"postnorm": False}, "postnorm=False is not what this project's model does: True"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config="),
    "window": ({"sliding_window": 4096}, "sliding_window=4096"),
    "unknown key": ({"mystery": 1}, "mystery=1 is not known and could change what the model"),
    "text for a number": ({"hidden_size": "32"}, "hidden_size='32' is not a whole number"),
    "missing": ({"vocab_size": ...}, "vocab_size is missing"),
    "layers": ({"attn_type_list": [0, 0, 2, 1]}, "attn_type_list=.* is not a list of 0 and 1"),
    "fewer layers": ({"attn_type_list": [0, 1]}, "names 2 layers, num_hidden_layers=4"),
    "two factors": ({"layernorm_mlp_alpha": 2.0}, "layernorm_mlp_alpha=2.0 differ, but"),
    "scaled rope": ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "type yarn is not known"),
    "rotation in words": ({"rotary_dim": "half"}, "rotary_dim='half' is not a whole number"),
    "rope in words": ({"rope_scaling": "yarn"}, "type yarn is not known"),
    "odd rotation": ({"rotary_dim": 7}, "model.rotary_dim=7 must be even"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_that_is_not_understood_is_refused(name: str, folder: Path) -> None:
    changes, said = CONFIGS[name]

    def change(config: dict[str, Any]) -> None:
        config.update(changes)
        for key in [key for key, value in config.items() if value is ...]:
            del config[key]

    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=said):
        recognition.recognise(folder)


def test_keys_are_ignored_by_name_only(folder: Path) -> None:
    change_json(folder / "config.json", lambda config: config.update(mystery=1))
    assert recognition.recognise(folder, ignore=["mystery"]).problems() == []


def test_a_partial_rotation_that_the_native_class_would_not_do_is_refused(tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "toy")
    for changes in ({"rotary_dim": 8}, {"partial_rotary_factor": 0.5}):
        before = (folder / "config.json").read_text()
        change_json(folder / "config.json", lambda config, changes=changes: config.update(changes))
        with pytest.raises(InputError, match="rotate 8 of a head's 16 dimensions.*silently"):
            recognition.recognise(folder)
        (folder / "config.json").write_text(before)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("slope_rate", lambda decay: decay * 2),
        ("slope_rate", lambda decay: decay * float("nan")),
        ("key_decay", lambda decay: decay.flip(1)),
        ("diagonal_decay", lambda decay: decay.long()),
    ],
)
def test_decays_of_another_model_are_refused(
    kind: str, change: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    """transformers takes them from the file, so a model may have been trained with others."""
    folder = write_toy(tmp_path / "toy")
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({n: change(t) if n.endswith(kind) else t for n, t in tensors.items()}, file)
    said = refusal(folder)
    assert "3 of 12 stored decays are not MiniMax's" in said
    assert f"model.layers.0.self_attn.{kind}" in said


def test_decays_that_transformers_rounded_are_taken(tmp_path: Path) -> None:
    """With a model in BF16, its class stores those in BF16 too."""
    transformers_model().to(torch.bfloat16).save_pretrained(tmp_path / "toy")
    given = recognition.recognise(tmp_path / "toy")
    assert {given.folder.form(name).dtype for name in given.decays} == {torch.bfloat16}
    assert given.problems() == []


def test_no_code_is_copied(folder: Path, tmp_path: Path) -> None:
    (folder / "modeling_minimax_m1.py").write_text("raise SystemExit")
    (folder / "tokenizer_config.json").write_text("{}")
    checkpoint = import_folder(folder, tmp_path / "checkpoint")
    out = export_checkpoint(checkpoint, tmp_path / "out", "minimax_m1")
    assert (out / "tokenizer_config.json").exists()
    assert not list(checkpoint.glob("*.py")) + list(out.glob("*.py"))


def test_a_folder_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(InputError, match="has neither model.safetensors.index.json"):
        open_folder(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match="config.json cannot be read"):
        open_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="holds list, not a JSON object"):
        open_folder(tmp_path)
