"""A corpus that every machine has: the sources and texts of Python's standard library.

Small, real, and free of any download: what the quickstart and the tests train on.
"""

from __future__ import annotations

import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from megatron_m1.data.indexed import IndexedWriter
from megatron_m1.data.tokenizer import Tokenizer, train_bpe
from megatron_m1.files import whole

_SUFFIXES = (".py", ".txt", ".rst")
_SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"),
    "pydoc_data",  # one huge dictionary, whose entries are documents of their own here
}
_BUILD_SPECIFIC = ("_sysconfigdata", "config-")  # differ between builds of one Python version
_ENCODE_CHUNK = 64


class Document(NamedTuple):
    """A text and where it is from."""

    name: str
    text: str


@dataclass(frozen=True)
class Manifest:
    """What `prepare_standard_library` wrote; the dictionaries have the keys train and valid."""

    python: str
    vocab_size: int
    seed: int
    valid_fraction: float
    max_bytes: int | None
    tokenizer_sha256: str
    documents: dict[str, int]
    tokens: dict[str, int]
    bytes: dict[str, int]


def standard_library_documents(max_bytes: int | None = None) -> list[Document]:
    """Every source file, text file and help topic of the running Python, tests left out.

    The order follows the hash of the name, so that the first `max_bytes` (UTF-8; documents that
    would go over are left out) are a fair sample. Depends on the Python version and nothing else.
    """
    documents = sorted([*_files(), *_topics()], key=lambda d: sha256(d.name.encode()).digest())
    if max_bytes is None:
        return documents
    chosen, used = [], 0
    for document in documents:
        size = len(document.text.encode())
        if used + size <= max_bytes:
            chosen.append(document)
            used += size
    return chosen


def prepare_standard_library(
    folder: str | Path,
    vocab_size: int = 8192,
    seed: int = 0,
    valid_fraction: float = 0.02,
    max_bytes: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Manifest:
    """Write tokenizer.json, train.bin/.idx, valid.bin/.idx and manifest.json into `folder`, once.

    The manifest comes last; a call that finds one returns at once, and calls made at the same time
    on one machine wait for the first. `seed` picks the documents held out for validation.

    Raises ValueError for arguments out of range, or other than those the folder was prepared with.
    """
    if not 0 < valid_fraction < 1:
        raise ValueError(f"valid_fraction is {valid_fraction}; give a share above 0 and below 1")
    folder = Path(folder)
    manifest_path = folder / "manifest.json"
    recipe = {
        "vocab_size": vocab_size,
        "seed": seed,
        "valid_fraction": valid_fraction,
        "max_bytes": max_bytes,
    }
    if not manifest_path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if not manifest_path.exists():
                manifest = _prepare(folder, recipe, progress or (lambda message: None))
                with whole(manifest_path) as partial:
                    partial.write_text(json.dumps(asdict(manifest), indent=2) + "\n")
    return _read_manifest(manifest_path, recipe)


def _prepare(folder: Path, recipe: dict, progress: Callable[[str], None]) -> Manifest:
    parts = _split(
        standard_library_documents(recipe["max_bytes"]), recipe["seed"], recipe["valid_fraction"]
    )
    size = {part: sum(len(d.text.encode()) for d in docs) for part, docs in parts.items()}
    progress(f"training a tokenizer on {size['train'] / 1e6:.1f} MB of Python's standard library")
    tokenizer = train_bpe((d.text for d in parts["train"]), recipe["vocab_size"])
    tokenizer.save(folder)

    tokens = {}
    for part, documents in parts.items():
        with IndexedWriter(folder / part, tokenizer.vocab_size) as writer:
            for ids in _encode(tokenizer, documents):
                writer.add(ids)
        tokens[part] = writer.tokens
        progress(f"{part}: {writer.documents} documents, {writer.tokens} tokens")
    return Manifest(
        python=platform.python_version(),
        **recipe,
        tokenizer_sha256=tokenizer.sha256,
        documents={part: len(documents) for part, documents in parts.items()},
        tokens=tokens,
        bytes=size,
    )


def _read_manifest(path: Path, recipe: dict) -> Manifest:
    manifest = Manifest(**json.loads(path.read_text()))
    for name, wanted in recipe.items():
        found = getattr(manifest, name)
        if found != wanted:
            raise ValueError(
                f"{path.parent} was prepared with {name} {found}, and {wanted} is asked for: use "
                "another folder, or delete this one"
            )
    return manifest


def _split(documents: list[Document], seed: int, fraction: float) -> dict[str, list[Document]]:
    """Hold out the documents whose seeded text hash is lowest; each part gets one at least."""
    if len(documents) < 2:
        raise ValueError(f"{len(documents)} documents cannot be split in two; raise max_bytes")
    held_out = min(max(1, round(fraction * len(documents))), len(documents) - 1)
    ranked = sorted(documents, key=lambda d: sha256(f"{seed}\n{d.text}".encode()).digest())
    return {"train": ranked[held_out:], "valid": ranked[:held_out]}


def _encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> Iterator[list[int]]:
    for start in range(0, len(documents), _ENCODE_CHUNK):
        texts = [d.text for d in documents[start : start + _ENCODE_CHUNK]]
        for ids in tokenizer.encode_batch(texts, parse_special=False):
            yield [*ids, tokenizer.eod]


def _files() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in _SKIPPED_FOLDERS and not name.startswith(_BUILD_SPECIFIC)
        ]
        for name in names:
            if name.endswith(_SUFFIXES) and not name.startswith(_BUILD_SPECIFIC):
                path = Path(folder, name)
                with suppress(UnicodeDecodeError):
                    yield from _document(str(path.relative_to(root)), path.read_text("utf-8"))


def _topics() -> Iterator[Document]:
    with suppress(ImportError):  # some distributions package it apart
        for name, text in import_module("pydoc_data.topics").topics.items():
            yield from _document(f"pydoc_data.topics/{name}", text)


def _document(name: str, text: str) -> Iterator[Document]:
    if text.strip():
        yield Document(name, text)
