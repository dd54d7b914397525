"""Checkpoints that were made to run code do not."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from megatron_m1.checkpoint import reading, store, unpickling
from megatron_m1.checkpoint.choosing import chosen
from megatron_m1.errors import InputError
from megatron_m1.training.run import Run
from tests.checkpoint.spoil import Planted, change_metadata, plant_in_metadata, put_in
from tests.training.small_run import start


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    """A file that is there if the planted code ran."""
    return tmp_path / "it ran".replace(" ", "_")


def test_plain_torch_runs_what_is_planted(checkpoint: Path, proof: Path) -> None:
    change_metadata(checkpoint, plant_in_metadata(proof))
    torch_checkpoint.FileSystemReader(checkpoint).read_metadata()
    assert proof.exists()


def test_planted_code_does_not_run(run: Run, checkpoint: Path, proof: Path) -> None:
    change_metadata(checkpoint, plant_in_metadata(proof))
    with chosen(None, run.checkpoint_dir, "full") as path:
        assert path == checkpoint, "its manifest is as good as any"
        with pytest.raises(InputError) as refused:
            store.load(start(run.config), path)
    assert str(refused.value).startswith(f"{checkpoint}/.metadata asks for posix.system, which no")
    assert not proof.exists()


@pytest.mark.parametrize(
    "name", ["builtins.eval", "builtins.getattr", "torch.load", "pathlib.Path.write_text"]
)
def test_other_names_are_refused_too(name: str, checkpoint: Path) -> None:
    module, _, attribute = name.partition(".")
    code = (
        pickle.PROTO
        + b"\x04"
        + b"".join(
            pickle.SHORT_BINUNICODE + bytes([len(part)]) + part.encode()
            for part in (module, attribute)
        )
    )
    (checkpoint / ".metadata").write_bytes(code + pickle.STACK_GLOBAL + pickle.STOP)
    with pytest.raises(InputError, match=f"asks for {name}, which no checkpoint needs"):
        unpickling.read_metadata(checkpoint)


def test_the_description_is_read_once(
    run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is checked is what is used: a file that changes in between changes nothing."""
    read = unpickling.read_metadata

    def and_remove(folder: Path) -> Metadata:
        found = read(folder)
        (folder / ".metadata").unlink()
        return found

    monkeypatch.setattr(reading, "read_metadata", and_remove)
    store.load(start(run.config), checkpoint)


@pytest.mark.parametrize("content", [{"a": 1}, Metadata({}), Metadata({}, storage_data=[])])
def test_what_describes_no_checkpoint_is_refused(content: object, checkpoint: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match="does not describe a checkpoint"):
        unpickling.read_metadata(checkpoint)


@pytest.mark.parametrize(
    "info",
    [
        _StorageInfo("../step_000002/__0_0.distcp", 0, 10),
        _StorageInfo("/etc/passwd", 0, 10),
        _StorageInfo("__0_0.distcp", 0, 10, ["stream.zstd"]),
        "__0_0.distcp",
    ],
)
def test_files_lie_in_the_folder(info: Any, checkpoint: Path) -> None:
    def change(metadata: Metadata) -> Metadata:
        metadata.storage_data[next(iter(metadata.storage_data))] = info
        return metadata

    change_metadata(checkpoint, change)
    with pytest.raises(InputError, match="which is no file of this checkpoint"):
        unpickling.read_metadata(checkpoint)


@pytest.mark.parametrize("damage", [b"", b"\x80\x04", b"not a pickle", b"\x80\x04N."])
def test_a_damaged_description_is_one_sentence(damage: bytes, run: Run, checkpoint: Path) -> None:
    (checkpoint / ".metadata").write_bytes(damage)
    with pytest.raises(InputError, match=f"^{checkpoint}/.metadata (cannot|does not)") as refused:
        store.load(start(run.config), checkpoint)
    assert "\n" not in str(refused.value)


def test_planted_code_beside_the_tensors_does_not_run(
    run: Run, checkpoint: Path, proof: Path
) -> None:
    torch.save({"progress": Planted(proof)}, checkpoint / "common.pt")
    with pytest.raises(InputError, match="common.pt asks for posix.system, which no checkpoint"):
        store.load(start(run.config), checkpoint)
    torch.save({"progress": print}, checkpoint / "common.pt")
    with pytest.raises(InputError, match="common.pt asks for print,"):
        store.load(start(run.config), checkpoint)
    (checkpoint / "common.pt").write_bytes(b"PK")
    with pytest.raises(InputError, match="common.pt cannot be read"):
        store.load(start(run.config), checkpoint)
    assert not proof.exists()


def is_object(name: str) -> bool:
    return "_extra_state" in name


def is_tensor(name: str) -> bool:
    return name.endswith("final_layernorm.weight")


def test_planted_objects_do_not_run(run: Run, checkpoint: Path, proof: Path) -> None:
    """Entries that are no tensors: torch's planner unpickles those without any check."""
    put_in(checkpoint, is_object, [Planted(proof)])
    with pytest.raises(InputError, match="_extra_state.* asks for posix.system"):
        store.load(start(run.config), checkpoint)
    assert not proof.exists()


def test_planted_tensors_do_not_run(run: Run, checkpoint: Path, proof: Path) -> None:
    put_in(checkpoint, is_tensor, Planted(proof))
    with pytest.raises(InputError, match=f"^{checkpoint} asks for posix.system, which no check"):
        store.load(start(run.config), checkpoint)
    assert not proof.exists()


def test_a_pickle_within_a_tensor_is_refused(run: Run, checkpoint: Path) -> None:
    """Transformer Engine would unpickle it."""
    planted = torch.frombuffer(bytearray(pickle.dumps(1)), dtype=torch.uint8)
    put_in(checkpoint, is_object, [planted])
    with pytest.raises(InputError, match="_extra_state.* asks for a pickle within a tensor"):
        store.load(start(run.config), checkpoint)
    put_in(checkpoint, is_object, [torch.empty(0, dtype=torch.uint8)])
    store.load(start(run.config), checkpoint)
