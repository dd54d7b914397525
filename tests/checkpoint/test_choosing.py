"""Which checkpoint a program starts from, also where some are damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_m1.checkpoint import lease, manifest, store
from megatron_m1.checkpoint.choosing import chosen
from megatron_m1.checkpoint.folders import from_latest, given_by
from megatron_m1.checkpoint.manifest import MANIFEST
from megatron_m1.errors import InputError
from megatron_m1.training.run import Run
from megatron_m1.training.step import train_step
from parallel.layout import Layout
from tests.checkpoint.spoil import flip_bit, names
from tests.distributed import Pool
from tests.training.small_run import small_config, start

FILES = [".metadata", "__0_0.distcp", "common.pt", "metadata.json", "config.json", MANIFEST]


@pytest.fixture
def newer(run: Run) -> Path:
    """A second checkpoint, which is the latest."""
    train_step(run)
    return store.save(run)


def choice(load: Path | None, own: Path | None, verify: str = "full") -> Path | None:
    with chosen(str(load) if load else None, own, verify) as path:
        return path


def test_a_checkpoint_is_found_by_each_of_its_folders(run: Run, checkpoint: Path) -> None:
    for folder in (run.dir, run.checkpoint_dir, checkpoint):
        assert given_by(str(folder)) == [checkpoint]
    with pytest.raises(InputError, match="checkpoint.load=.*nowhere holds no checkpoint"):
        given_by(str(run.dir / "nowhere"))


def test_what_is_being_written_is_no_checkpoint(checkpoint: Path) -> None:
    partial = checkpoint.rename(checkpoint.with_suffix(".tmp"))
    with pytest.raises(InputError, match="holds no checkpoint"):
        given_by(str(partial))


def test_a_dangling_pointer_does_not_start_training_anew(run: Run, checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    with pytest.raises(InputError, match="latest names step_000001"):
        from_latest(run.checkpoint_dir)


def test_a_pointer_cannot_lead_out_of_its_folder(run: Run, checkpoint: Path) -> None:
    elsewhere = run.dir / "elsewhere"
    checkpoint.rename(elsewhere)
    (run.checkpoint_dir / "latest").write_text("../elsewhere")
    with pytest.raises(InputError, match="latest names elsewhere"):
        from_latest(run.checkpoint_dir)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"step_"])
def test_without_a_readable_pointer_the_newest_counts(
    content: bytes | None, run: Run, checkpoint: Path, newer: Path
) -> None:
    pointer = run.checkpoint_dir / "latest"
    pointer.unlink()
    if content is not None:
        pointer.write_bytes(content)
    assert from_latest(run.checkpoint_dir) == [newer, checkpoint]
    assert from_latest(run.dir / "nothing") == []


def test_without_its_manifest_a_checkpoint_gives_way(
    run: Run, checkpoint: Path, newer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (newer / MANIFEST).unlink()
    assert choice(None, run.checkpoint_dir) == checkpoint
    assert "is damaged: it has no manifest.json; going back" in capsys.readouterr().err


def test_a_restarted_run_goes_on_from_its_own_checkpoints(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    other, nothing = tmp_path / "other", tmp_path / "nothing"
    shutil.copytree(run.dir, other)
    assert choice(None, run.checkpoint_dir) == checkpoint
    assert choice(None, nothing) is None
    assert choice(other, nothing) == other / "checkpoints" / "step_000001"
    assert choice(other, run.checkpoint_dir) == checkpoint


def test_an_own_step_that_is_asked_for_goes_before_the_latest(
    run: Run, checkpoint: Path, newer: Path
) -> None:
    assert choice(checkpoint, run.checkpoint_dir) == checkpoint
    assert choice(None, run.checkpoint_dir) == newer


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_and_passed_over(
    name: str, run: Run, checkpoint: Path, newer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_bit(newer / name)
    assert choice(None, run.checkpoint_dir) == checkpoint
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: checkpoint {newer} is damaged: {name} ")
    assert warning.endswith("; going back to step_000001\n")
    with pytest.raises(InputError, match=f"^checkpoint {newer} is damaged: {name} "):
        choice(newer, run.checkpoint_dir)


@pytest.mark.parametrize("verify", ["full", "sizes"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_a_file_of_another_size_is_found(
    damage: str, verify: str, run: Run, checkpoint: Path, newer: Path
) -> None:
    (tensors,) = newer.glob("*.distcp")
    size = tensors.stat().st_size
    if damage == "missing":
        tensors.unlink()
    else:
        tensors.write_bytes(tensors.read_bytes()[: 1000 if damage == "truncated" else 0])
    found = {"missing": "is missing", "truncated": "has 1000 bytes", "empty": "has 0 bytes"}
    with pytest.raises(InputError, match=found[damage]) as refused:
        choice(newer, None, verify)
    assert damage == "missing" or f"not the {size} of manifest.json" in str(refused.value)
    assert choice(None, run.checkpoint_dir, verify) == checkpoint


def test_sizes_alone_do_not_show_a_flipped_bit(run: Run, newer: Path) -> None:
    flip_bit(newer / "__0_0.distcp")
    assert choice(None, run.checkpoint_dir, "sizes") == newer


def test_a_latest_that_is_gone_gives_way(run: Run, checkpoint: Path, newer: Path) -> None:
    shutil.rmtree(newer)
    assert choice(None, run.checkpoint_dir) == checkpoint


def test_what_is_chosen_is_kept_while_it_is_read(checkpoint: Path) -> None:
    with chosen(str(checkpoint), None, "full"):
        assert lease.is_read(checkpoint)
    assert not lease.is_read(checkpoint)


def test_steps_after_the_latest_are_not_taken(run: Run, checkpoint: Path, newer: Path) -> None:
    """They are of a run that was taken back."""
    (run.checkpoint_dir / "latest").write_text(checkpoint.name)
    flip_bit(checkpoint / "common.pt")
    with pytest.raises(InputError, match="step_000001 is damaged: common.pt"):
        choice(None, run.checkpoint_dir)


def test_all_damaged_is_an_error(run: Run, checkpoint: Path, newer: Path) -> None:
    for path in (checkpoint, newer):
        flip_bit(path / "common.pt")
    with pytest.raises(InputError, match="step_000001 is damaged: common.pt"):
        choice(None, run.checkpoint_dir)


def test_without_a_manifest_it_is_read_with_a_warning(
    run: Run, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / MANIFEST).unlink()
    assert choice(None, run.checkpoint_dir) == checkpoint
    assert "step_000001 has no manifest.json: it is read without" in capsys.readouterr().err


def test_a_manifest_names_no_file_elsewhere(checkpoint: Path) -> None:
    entry = manifest.Entry(1, "0")
    (checkpoint / MANIFEST).write_bytes(manifest.as_bytes({"../../secret": entry}))
    with pytest.raises(InputError, match="names a file outside the folder"):
        choice(checkpoint, None)


def verified(folder: Path) -> str:
    try:
        return str(choice(None, folder))
    except InputError as error:
        return str(error)


def saved(config: object) -> None:
    run = start(config)  # type: ignore[arg-type]
    train_step(run)
    store.save(run)


def test_each_process_looks_at_a_share_and_all_hear_of_it(
    ranks: Callable[[int], Pool], prefix: str, tmp_path: Path
) -> None:
    config = small_config(str(tmp_path), prefix, parallel=Layout(tp=2))
    ranks(2).run(saved, config)
    step = tmp_path / "checkpoints" / "step_000001"
    assert {"__0_0.distcp", "__1_0.distcp"} < names(step)
    assert ranks(2).run(verified, step.parent) == [str(step)] * 2
    for name in ("__0_0.distcp", "__1_0.distcp"):
        flip_bit(step / name)
        said = f"checkpoint {step} is damaged: {name} does not have the SHA-256 of manifest.json"
        assert ranks(2).run(verified, step.parent) == [said] * 2
        flip_bit(step / name)
