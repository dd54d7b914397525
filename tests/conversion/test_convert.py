"""Weights into our checkpoints and out of them, in every format."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, MiniMaxForCausalLM

from megatron_m1.checkpoint import disk, manifest
from megatron_m1.checkpoint.mapping import MINIMAX
from megatron_m1.checkpoint.models import saved_model
from megatron_m1.conversion import jobs, recognition
from megatron_m1.conversion.convert import convert
from megatron_m1.conversion.families import BY_NAME, FAMILIES, Family, QueryGroupsInHalves
from megatron_m1.conversion.logits import our_logits, some_tokens, their_logits
from megatron_m1.conversion.words import REMOTE
from megatron_m1.data.tokenizer import train_bpe
from megatron_m1.errors import InputError, StorageError
from parallel.layout import Layout
from tests.conversion.foreign import (
    PARTIAL,
    SMALL,
    WHOLE,
    assert_equal,
    export_checkpoint,
    import_folder,
    parameters_of,
    tensors_of,
    transformers_model,
    write_toy,
)

FORMATS = [family.name for family in FAMILIES]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers wrote."""
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def imported(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_folder(toy, tmp_path_factory.mktemp("imported") / "checkpoint")


@pytest.fixture(scope="module")
def partial(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in a model that rotates half of each head."""
    folder = export_checkpoint(imported, tmp_path_factory.mktemp("partial") / "hf", "minimax_m1")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rotary_dim": PARTIAL.rotary_dim}))
    return import_folder(folder, folder.parent / "checkpoint")


def test_what_transformers_wrote_is_read_as_its_model(imported: Path, toy: Path) -> None:
    given = recognition.recognise(toy)
    # transformers' weight of the balancing loss, in our scale.
    assert given.model == replace(WHOLE, aux_loss_coef=0.001 * WHOLE.router_topk)
    assert saved_model(imported) == given.model
    assert given.family.name == "transformers"


@pytest.mark.parametrize("name", FORMATS)
def test_out_and_in_again_is_the_same(name: str, imported: Path, tmp_path: Path) -> None:
    folder = export_checkpoint(imported, tmp_path / "hf", name)
    given = recognition.recognise(folder)
    assert (given.family.name, given.problems()) == (name, [])
    again = import_folder(folder, tmp_path / "again")
    assert_equal(parameters_of(again), parameters_of(imported))


def test_the_folder_of_transformers_comes_back_bit_for_bit(
    imported: Path, toy: Path, tmp_path: Path
) -> None:
    """Block size and special tokens come from the checkpoint's import."""
    folder = export_checkpoint(imported, tmp_path / "hf", "transformers")
    slopes = {name: t for name, t in tensors_of(toy).items() if "_decay" in name or "slope" in name}
    weights = {name: t for name, t in tensors_of(toy).items() if name not in slopes}
    written = tensors_of(folder)
    for name, tensor in slopes.items():
        torch.testing.assert_close(written.pop(name), tensor, rtol=0, atol=1e-4)
    assert_equal(written, weights)
    theirs, ours = (json.loads((f / "config.json").read_text()) for f in (toy, folder))
    assert {key: ours[key] for key in theirs} == theirs


def test_names_in_memory_are_those_of_transformers(imported: Path, tmp_path: Path) -> None:
    """A state dictionary saved as it is, with the experts stacked."""
    hf = transformers_model()
    hf.config.save_pretrained(tmp_path)
    state = {name: tensor.contiguous() for name, tensor in hf.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    assert not json.loads((tmp_path / "config.json").read_text()).get("architectures")
    assert recognition.recognise(tmp_path).family.name == "transformers_memory"
    again = import_folder(tmp_path, tmp_path / "again")
    assert_equal(parameters_of(again), parameters_of(imported))
    folder = export_checkpoint(again, tmp_path / "hf", "transformers_memory")
    assert tensors_of(folder).keys() == state.keys()


def test_an_index_says_what_the_shards_hold(imported: Path, tmp_path: Path) -> None:
    folder = export_checkpoint(imported, tmp_path / "hf", "minimax_m1")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    read = {file.name: load_file(file) for file in files}
    found = {name: file for file, tensors in read.items() for name in tensors}
    assert index["weight_map"] == found
    sizes = {file: sum(t.nbytes for t in tensors.values()) for file, tensors in read.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values()) == 4 * WHOLE.num_params()
    assert index["metadata"]["total_parameters"] == WHOLE.num_params()
    assert max(sizes.values()) <= SMALL
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    assert {path.name for path in folder.iterdir()} - set(read) == {
        *("config.json", "generation_config.json", "model.safetensors.index.json")
    }


def test_types_stay_or_are_what_is_asked(imported: Path, tmp_path: Path) -> None:
    """As released: BF16, but for the routers."""
    folder = export_checkpoint(imported, tmp_path / "hf", "minimax_m1", "bf16")
    exact = tensors_of(export_checkpoint(imported, tmp_path / "exact", "minimax_m1"))
    for name, tensor in tensors_of(folder).items():
        expected = torch.float32 if name.endswith(".gate.weight") else torch.bfloat16
        assert tensor.dtype == expected, name
        torch.testing.assert_close(tensor, exact[name].to(expected), rtol=0, atol=0)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert_equal(
        tensors_of(
            export_checkpoint(import_folder(folder, tmp_path / "a"), tmp_path / "b", "minimax_m1")
        ),
        tensors_of(folder),
    )
    wide = parameters_of(import_folder(folder, tmp_path / "c", "fp32"))
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}


def test_many_processes_write_the_same(imported: Path, tmp_path: Path) -> None:
    options = jobs.ExportOptions("minimax_m1", "stored", SMALL)
    convert(jobs.export_job(imported, tmp_path / "two", options), workers=2)
    one = export_checkpoint(imported, tmp_path / "one", "minimax_m1")
    for file in one.iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_too_little_space_is_told_before_writing(
    imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_free", lambda folder: 100_000)
    with pytest.raises(StorageError, match=r"hf cannot .* it needs 364 kB, 100 kB are free"):
        export_checkpoint(imported, tmp_path / "hf", "minimax_m1")
    assert not list((tmp_path / "hf.partial").glob("*.safetensors"))


def test_an_import_has_a_manifest_of_all_its_files(imported: Path) -> None:
    files = manifest.read(imported)
    assert files is not None
    assert files.keys() == {path.name for path in imported.iterdir()} - {manifest.MANIFEST}
    manifest.check(imported, files, files, is_full=True)


def test_the_native_class_is_not_given_a_partial_rotation(partial: Path, tmp_path: Path) -> None:
    for name in ("transformers", "transformers_memory"):
        with pytest.raises(InputError, match="rotates 8 of a head's 16 dimensions.*--permute-rope"):
            export_checkpoint(partial, tmp_path / name, name)


def test_what_a_format_has_no_words_for_is_refused(imported: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(imported, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    config["model"]["lightning_norm_eps"] = 1e-5
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="lightning_norm_eps=1e-05, but the format's classes"):
        export_checkpoint(checkpoint, tmp_path / "hf", "minimax_m1")
    export_checkpoint(checkpoint, tmp_path / "own", "megatron_m1")


@pytest.mark.parametrize("name", ["transformers", "transformers_memory"])
def test_a_permuted_rotation_is_computed_right(
    name: str, single_process: Layout, partial: Path, tmp_path: Path
) -> None:
    """By the class as it stands, from its own configuration; and it comes back as it was."""
    folder = export_checkpoint(partial, tmp_path / "hf", name, permute_rope=True)
    rows = some_tokens(PARTIAL)
    hf, info = MiniMaxForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours = our_logits(partial, rows)
    with torch.no_grad():
        for row, logits in zip(rows, ours, strict=True):
            torch.testing.assert_close(hf(row[None]).logits[0], logits, rtol=0, atol=1e-4)
    again = import_folder(folder, tmp_path / "again")
    assert saved_model(again).rotary_dim == PARTIAL.rotary_dim
    assert_equal(parameters_of(again), parameters_of(partial))


def test_a_length_that_nobody_gave_is_said(
    partial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(partial, checkpoint)
    for name in ("foreign_config.json", manifest.MANIFEST):
        (checkpoint / name).unlink()
    export_checkpoint(checkpoint, tmp_path / "a", "minimax_m1")
    assert "gets max_position_embeddings=" in capsys.readouterr().err
    export_checkpoint(checkpoint, tmp_path / "b", "minimax_m1", max_length=99)
    assert "max_position_embeddings" not in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"attention_factor": 3.0}, {"short_factor": [1.0] * 8}])
def test_a_rotation_that_does_more_is_refused(
    change: dict[str, Any], partial: Path, tmp_path: Path
) -> None:
    folder = export_checkpoint(partial, tmp_path / "hf", "transformers", permute_rope=True)
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_scaling", "rope_parameters"):
        config[key] = {**config[key], **change}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="rope_type=longrope is not known"):
        import_folder(folder, tmp_path / "again")


def test_without_the_permutation_it_would_be_wrong(
    single_process: Layout, partial: Path, tmp_path: Path
) -> None:
    folder = export_checkpoint(partial, tmp_path / "hf", "minimax_m1")
    rows = some_tokens(PARTIAL)
    right = their_logits(recognition.recognise(folder), rows)
    (tmp_path / "hf" / "config.json").write_text(
        (folder / "config.json").read_text().replace('"rotary_dim": 8', '"rotary_dim": 16')
    )
    wrong = their_logits(recognition.recognise(folder), rows)
    assert (right[0] - our_logits(partial, rows)[0]).abs().max() < 1e-4
    assert (right[0] - wrong[0]).abs().max() > 0.1


def test_another_family_is_another_table(
    imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other names, and its place in the list."""
    rules = tuple(
        replace(rule, theirs=tuple((f"other.{name}", shape) for name, shape in rule.theirs))
        for rule in MINIMAX
    )
    family = Family("other", ("OtherForCausalLM",), "other", REMOTE, rules)
    monkeypatch.setattr(recognition, "FAMILIES", (*FAMILIES, family))
    monkeypatch.setitem(BY_NAME, "other", family)
    folder = export_checkpoint(imported, tmp_path / "hf", "other")
    assert "other.model.layers.0.self_attn.qkv_proj.weight" in tensors_of(folder)
    assert_equal(parameters_of(import_folder(folder, tmp_path / "again")), parameters_of(imported))


def test_query_groups_in_halves_are_invertible() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(rows, 32, generator=generator) for rows in (64, 32, 32)]
    operation = QueryGroupsInHalves()
    packed = operation.pack(tensors, PARTIAL)
    for back, tensor in zip(operation.unpack(packed, PARTIAL), tensors, strict=True):
        assert torch.equal(back, tensor)


def test_what_goes_with_the_weights_comes_from_where_it_is_asked(
    imported: Path, tmp_path: Path
) -> None:
    """The import's own files, a folder to be like, or the run's tokenizer."""
    like = tmp_path / "like"
    like.mkdir()
    config = {"architectures": ["MiniMaxM1ForCausalLM"], "eos_token_id": 7, "rope_theta": 1.0}
    config |= {"auto_map": {"AutoConfig": "code.Config"}, "max_position_embeddings": 77}
    (like / "config.json").write_text(json.dumps(config))
    (like / "tokenizer_config.json").write_text('{"from": "like"}')
    folder = export_checkpoint(imported, tmp_path / "a", "minimax_m1", like=like)
    written = json.loads((folder / "config.json").read_text())
    assert written["rope_theta"] == WHOLE.rope_theta
    assert [written[key] for key in ("eos_token_id", "max_position_embeddings")] == [7, 77]
    assert written["auto_map"] == config["auto_map"]
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {"from": "like"}
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": 7}

    folder = export_checkpoint(imported, tmp_path / "b", "minimax_m1", max_length=99)
    written = json.loads((folder / "config.json").read_text())
    # Keys that only transformers' class knows stay behind.
    assert "block_size" not in written and written["max_position_embeddings"] == 99


def test_a_runs_tokenizer_goes_out_with_it(imported: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(imported, checkpoint)
    tokenizer = train_bpe(["some text"], 300, ["<eod>"])
    tokenizer.save(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "data": {"eod": "<eod>"}}))
    (checkpoint / "foreign_config.json").unlink()
    (checkpoint / "generation_config.json").unlink()
    folder = export_checkpoint(checkpoint, tmp_path / "hf", "transformers")
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": 0}
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded("some text").input_ids == tokenizer.encode("some text")
    assert loaded.eos_token == "<eod>"
