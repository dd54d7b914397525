"""One of our checkpoints read by a converter, where somebody has changed it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from torch.distributed.checkpoint.metadata import Metadata

from megatron_m1.conversion.inspection import inspect
from megatron_m1.errors import InputError
from tests.checkpoint.spoil import Planted, change_metadata, plant_in_metadata, put_in
from tests.conversion.foreign import export_checkpoint, import_folder, write_toy

NAME = "decoder.final_layernorm.weight"


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    return import_folder(write_toy(folder / "toy"), folder / "checkpoint")


@pytest.fixture
def checkpoint(imported: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(imported, tmp_path / "checkpoint"))


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    """A file that is there if the planted code ran."""
    return tmp_path / "it_ran"


def test_planted_code_does_not_run(checkpoint: Path, proof: Path) -> None:
    change_metadata(checkpoint, plant_in_metadata(proof))
    for read in (inspect, lambda path: export_checkpoint(path, path.parent / "hf", "minimax_m1")):
        with pytest.raises(InputError, match="metadata asks for posix.system, which no checkpoint"):
            read(checkpoint)
    assert not proof.exists()


def test_planted_tensors_do_not_run(checkpoint: Path, proof: Path) -> None:
    put_in(checkpoint, lambda name: name == NAME, Planted(proof))
    with pytest.raises(InputError, match=f"{NAME} cannot be read from __0_0.distcp"):
        export_checkpoint(checkpoint, checkpoint.parent / "hf", "minimax_m1")
    assert not proof.exists()


def test_a_tensor_of_which_a_part_is_missing_is_refused(checkpoint: Path) -> None:
    def change(metadata: Metadata) -> Metadata:
        metadata.state_dict_metadata[NAME].chunks.clear()
        return metadata

    change_metadata(checkpoint, change)
    with pytest.raises(InputError, match=f"holds only parts of {NAME}"):
        export_checkpoint(checkpoint, checkpoint.parent / "hf", "minimax_m1")
