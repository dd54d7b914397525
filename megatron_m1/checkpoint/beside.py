"""Files that belong to a model beside its weights: tokenizer, generation, the config.json of its
origin. An import brings them, every run that goes on from it keeps them, an export hands them out.

They may come from strangers: a name cannot lead out of its folder, and none of them holds code.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_m1.errors import InputError

if TYPE_CHECKING:
    from megatron_m1.data.tokenizer import Tokenizer

TOKENIZER = "tokenizer.json"
GENERATION = "generation_config.json"
_OF_TOKENIZER = (
    *(TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
SIDE_FILES = (*_OF_TOKENIZER, GENERATION)
FOREIGN_CONFIG = "foreign_config.json"
"""The config.json that imported weights came with, inside our checkpoint."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def side_files(folder: Path) -> list[str]:
    """Which of the tokenizer's and generation's files a folder has."""
    return [name for name in SIDE_FILES if os.path.lexists(folder / name)]


def read_side_files(folder: Path) -> dict[str, bytes]:
    """Their contents.

    Raises:
        InputError: one leads out of the folder, cannot be read or is not the JSON that its name
            says.
    """
    return {name: read_inside(folder, name) for name in side_files(folder)}


def carried(folder: Path, tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """What a run that starts from a checkpoint keeps in its own: all of it; under another tokenizer
    nothing that speaks of tokens.

    Args:
        tokenizer: the run's; None keeps the checkpoint's.

    Raises:
        InputError: as for ``read_side_files``.
    """
    files = read_side_files(folder)
    if os.path.lexists(folder / FOREIGN_CONFIG):
        files[FOREIGN_CONFIG] = read_inside(folder, FOREIGN_CONFIG)
    if not tokenizer or TOKENIZER not in files or tokenizer.is_written_in(files[TOKENIZER]):
        return files
    foreign = json.loads(files.get(FOREIGN_CONFIG, b"{}"))
    said = {key: value for key, value in foreign.items() if key not in TOKEN_IDS}
    return {FOREIGN_CONFIG: json_bytes(said)} if said else {}


def read_inside(folder: Path, name: str) -> bytes:
    """A file of the folder.

    Raises:
        InputError: it leads out of it, cannot be read or is not the JSON that its name says.
    """
    try:
        content = inside(folder, name).read_bytes()
        if name.endswith(".json") and not isinstance(json.loads(content), dict):
            raise InputError(f"{folder / name} is not a JSON object")
    except OSError as error:
        raise InputError(f"{folder / name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder / name} is not JSON: {error}") from error
    return content


def inside(folder: Path, name: str) -> Path:
    """A file of the folder, or of the cache of downloads whose snapshot the folder is.

    Raises:
        InputError: it is a link to somewhere else.
    """
    target = (folder / name).resolve()
    # A snapshot of Hugging Face's cache is a folder of links: snapshots/REVISION -> blobs.
    homes = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        homes.append(folder.resolve().parents[1] / "blobs")
    if target.parent not in homes:
        raise InputError(f"{folder / name} is a link out of its folder, to {target}: copy it there")
    return target


def json_bytes(value: object) -> bytes:
    """A JSON file that people can read."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
