"""Which checkpoint is read: the one that is asked for, or the newest that is whole."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_m1.checkpoint import agreement, lease, manifest
from megatron_m1.checkpoint.folders import (
    earlier,
    from_latest,
    given_by,
    is_whole,
    step_folder,
)
from megatron_m1.checkpoint.manifest import MANIFEST
from megatron_m1.errors import InputError


@contextmanager
def chosen(load: str | None, own: Path | None, verify: str) -> Iterator[Path | None]:
    """Where a program starts: the latest of a run's ``own`` folder, else ``load``; None where there
    is neither. A step folder in ``own`` that ``load`` names outright goes before the latest.

    What ``latest`` leads to gives way to the next earlier checkpoint where it is damaged; one that
    is named outright does not. The choice is kept from being removed while the block runs.
    Collective: the first process looks, since a shared file system may show the others an older
    folder.

    Args:
        verify: ``full`` compares sizes and hashes with the manifest, ``sizes`` the sizes alone.

    Raises:
        InputError: there is none, or none that is whole.
    """
    paths = agreement.on_first(lambda: _candidates(load, own))
    with ExitStack() as leases:
        yield _first_whole(paths, verify, leases)


@contextmanager
def newest_before(folder: Path, step: int, verify: str) -> Iterator[Path | None]:
    """The newest checkpoint in a folder that is of an earlier step and not damaged; None without
    one. It is kept from being removed while the block runs. Collective."""
    paths = agreement.on_first(lambda: earlier(step_folder(folder, step)))
    with ExitStack() as leases:
        try:
            found = _first_whole(paths, verify, leases)
        except InputError as error:
            _warn(str(error))
            found = None
        yield found


def _candidates(load: str | None, own: Path | None) -> list[Path]:
    given = given_by(load) if load else []
    mine = from_latest(own) if own else []
    if own and load and is_whole(Path(load)) and Path(load).resolve().parent == own.resolve():
        return given
    return mine or given


def _first_whole(paths: list[Path], verify: str, leases: ExitStack) -> Path | None:
    for number, path in enumerate(paths, 1):
        try:
            agreement.on_first(partial(leases.enter_context, lease.reading(path)))
            _verify(path, verify, is_last=number == len(paths))
            return path
        except InputError as error:
            if number == len(paths):
                raise
            _warn(f"{error}; going back to {paths[number].name}")
    return None


def _verify(path: Path, verify: str, is_last: bool) -> None:
    """Compare a checkpoint with its manifest, each process its share of the files."""
    files = agreement.on_first(lambda: manifest.read(path))
    if files is None:
        if not is_last:
            raise manifest.Damaged.of(path, f"it has no {MANIFEST}")
        _warn(f"checkpoint {path} has no {MANIFEST}: it is read without being verified")
        return
    mine = manifest.share(files, dist.get_rank(), dist.get_world_size())
    agreement.everywhere(lambda: manifest.check(path, files, mine, is_full=verify == "full"))


def _warn(text: str) -> None:
    if dist.get_rank() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)
