"""Names in a folder of checkpoints: which is one, which is the latest, how one gets its name.

``step_000080`` is a whole checkpoint and ``latest`` a text file that names one. What is being
written is ``step_000080.tmp``, what a save of the same step replaces ``step_000080.old``, and what
is on its way out a hidden folder that ends in ``.deleted``.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

from megatron_m1.checkpoint.disk import replace_file, sync_folder
from megatron_m1.errors import InputError

CONFIG = "config.json"
METADATA = ".metadata"
LATEST = "latest"
PARTIAL = ".tmp"
REPLACED = ".old"
_DELETED = ".deleted"
_STEP = re.compile(r"step_(\d+)")


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}"


def step_of(path: Path) -> int:
    """The step that a folder's name gives; -1 where it is no checkpoint's name."""
    found = _STEP.fullmatch(path.name)
    return int(found[1]) if found else -1


def is_whole(path: Path) -> bool:
    """Whether a folder is a checkpoint that was finished."""
    return (path / CONFIG).is_file() and path.suffix != PARTIAL


def earlier(path: Path) -> list[Path]:
    """The whole checkpoints beside one that are of an earlier step, newest first."""
    if not path.parent.is_dir():
        return []
    found = [step for step in path.parent.iterdir() if -1 < step_of(step) < step_of(path)]
    return sorted(filter(is_whole, found), key=step_of, reverse=True)


def _all_whole(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step_*") if step_of(path) >= 0 and is_whole(path)]
    return sorted(found, key=step_of, reverse=True)


def given_by(where: str, key: str = "checkpoint.load=") -> list[Path]:
    """The checkpoints that a path means, the one to take first: itself; or the latest of a folder
    or of a run, and then the earlier ones there.

    Args:
        key: what the path was given as, for errors.

    Raises:
        InputError: it holds no checkpoint, but something else perhaps.
    """
    path = Path(where)
    if any(path.glob("*.safetensors*")):
        raise InputError(
            f"{key}{where} is a folder of safetensors and no checkpoint of this project: make one "
            f"of it by tools/convert_checkpoint.py import --hf {where} --out CKPT"
        )
    found = [path] if is_whole(path) else from_latest(path) or from_latest(path / "checkpoints")
    if not found:
        raise InputError(
            f"{key}{where} holds no checkpoint: give a step_N or imported folder, a folder with a "
            f"file named {LATEST}, or a run's folder"
        )
    return found


def holds_checkpoints(path: Path) -> bool:
    """Whether a folder is a checkpoint, or one or a run's with checkpoints in it."""
    patterns = (METADATA, f"step_*/{METADATA}", f"checkpoints/step_*/{METADATA}")
    return any(found for pattern in patterns for found in path.glob(pattern))


def from_latest(folder: Path) -> list[Path]:
    """The checkpoint that ``latest`` names, and then the earlier ones. Later ones are of a run that
    was taken back to an earlier step, or of a save that was killed just before it counted; where
    ``latest`` is missing or damaged they are all there is to go by.

    Raises:
        InputError: ``latest`` names one that is not there, and there is no earlier one.
    """
    pointer = folder / LATEST
    named = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
    path = folder / Path(named).name
    if not named or step_of(path) < 0:
        found = _all_whole(folder)
        if found or not pointer.is_file():
            return found
    replaced = path.with_suffix(REPLACED)
    if not path.exists() and is_whole(replaced):
        # A save was killed while it put a new checkpoint in the place of this one.
        path = replaced
    others = earlier(path.with_suffix(""))
    if not is_whole(path) and not others:
        raise InputError(f"{pointer} names {path.name}, but that is not a whole checkpoint")
    return [path, *others]


def publish(partial: Path, final: Path) -> None:
    """Give a whole checkpoint its name, in place of one that has it, and point ``latest`` at it.
    Killed at any point, it leaves ``latest`` naming a whole checkpoint."""
    replaced = final.with_suffix(REPLACED)
    if final.exists():
        remove([replaced])
        final.rename(replaced)
    partial.rename(final)
    sync_folder(final.parent)
    replace_file(final.parent / LATEST, final.name.encode())
    remove([replaced])


def clear_leftovers(folder: Path) -> None:
    """Remove what killed saves left: unfinished and half-removed checkpoints, and replaced ones,
    unless what was to replace them is not there."""
    for replaced in folder.glob(f"step_*{REPLACED}"):
        if not replaced.with_suffix("").exists():
            replaced.rename(replaced.with_suffix(""))
    for left in (f"step_*{PARTIAL}", f"step_*{REPLACED}", f".*{_DELETED}"):
        remove(folder.glob(left))


def set_aside(path: Path) -> Path:
    """Take a checkpoint's name from it, in one move: from here on it is no checkpoint."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{_DELETED}")
    path.rename(aside)
    return aside


def remove(paths: Iterable[Path]) -> None:
    """Remove folders; one that is half removed has lost its name before."""
    for path in paths:
        if path.exists():
            shutil.rmtree(
                path if path.name.endswith(_DELETED) else set_aside(path), ignore_errors=True
            )
