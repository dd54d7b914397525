"""Tokenise documents into Megatron's .bin and .idx files.

    python tools/preprocess_data.py --input 'corpus/*.jsonl' --output-prefix data/corpus \\
        --tokenizer-model tokenizer.json --append-eod --workers 8

A .jsonl or .json file holds one JSON object a line, with a text under each of --json-keys; any
other file is one document, the text of the first key. Writes PREFIX_KEY_document.bin and .idx for
each key: whole pairs, or after an error none at all.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from glob import glob
from itertools import islice
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_m1.data.indexed import IndexedWriter
from megatron_m1.data.tokenizer import END_OF_DOCUMENT, Tokenizer

_CHUNK = 256  # documents encoded at once, over all workers


class Record(NamedTuple):
    """A document's text under each key, and its bytes in the input."""

    texts: dict[str, str]
    size: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; a user's error ends it with one sentence and exit status 1."""
    args = _parser().parse_args(arguments)
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)  # the threads of `tokenizers`
    try:
        tokenizer = Tokenizer.load(args.tokenizer_model, args.eod_token)
        writers = write(args, tokenizer)
    except (ValueError, OSError) as error:
        sys.exit(f"preprocess_data: {error}")
    for prefix, writer in writers.items():
        print(f"{writer.documents} documents, {writer.tokens} tokens: {prefix}.bin, {prefix}.idx")


def write(args: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, IndexedWriter]:
    """Tokenise all input; the finished writers by the prefix of their files."""
    records = read_records(input_files(args.input), args.json_keys)
    speed = Speed(args.log_interval)
    prefixes = {key: f"{args.output_prefix}_{key}_document" for key in args.json_keys}
    with ExitStack() as stack:
        writers = {
            key: stack.enter_context(IndexedWriter(prefix, tokenizer.vocab_size))
            for key, prefix in prefixes.items()
        }
        while chunk := list(islice(records, _CHUNK)):
            for key, writer in writers.items():
                texts = [record.texts[key] for record in chunk]
                for ids in tokenizer.encode_batch(texts, args.parse_special_tokens):
                    writer.add([*ids, tokenizer.eod] if args.append_eod else ids)
            speed.add(len(chunk), sum(record.size for record in chunk))
    return {prefixes[key]: writer for key, writer in writers.items()}


def input_files(patterns: Sequence[str]) -> list[str]:
    """The files that paths and glob patterns name, each pattern's in alphabetical order.

    Raises FileNotFoundError for a pattern that names none.
    """
    files = []
    for pattern in patterns:
        found = sorted(glob(pattern, recursive=True))
        if not found:
            raise FileNotFoundError(f"no file is named by --input {pattern}")
        files += found
    return files


def read_records(files: Sequence[str], keys: Sequence[str]) -> Iterator[Record]:
    """Every document of the files; blank lines are none. Raises ValueError naming file and line."""
    for path in files:
        with open(path, "rb") as file:
            if not path.endswith((".jsonl", ".json")):
                yield _plain_record(path, file.read(), keys)
                continue
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _json_record(f"{path}, line {number}", line, keys)


class Speed:
    """Prints documents and megabytes a second to stderr, every `interval` documents."""

    def __init__(self, interval: int) -> None:
        self._interval, self._start = interval, time.monotonic()
        self._documents = self._bytes = 0

    def add(self, documents: int, size: int) -> None:
        """Count documents that are done, of `size` bytes."""
        before = self._documents
        self._documents += documents
        self._bytes += size
        if self._documents // self._interval > before // self._interval:
            seconds = max(time.monotonic() - self._start, 1e-9)
            print(
                f"{self._documents} documents, {self._documents / seconds:.0f} docs/s, "
                f"{self._bytes / 1e6 / seconds:.2f} MB/s",
                file=sys.stderr,
            )


def _json_record(where: str, line: bytes, keys: Sequence[str]) -> Record:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON in UTF-8 ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a JSON object is expected, not {type(value).__name__}")
    for key in keys:
        if not isinstance(value.get(key), str):
            raise ValueError(
                f"{where}: no text under the key {key}; the line has {', '.join(value) or 'none'}"
            )
    return Record({key: value[key] for key in keys}, len(line))


def _plain_record(path: str, content: bytes, keys: Sequence[str]) -> Record:
    if len(keys) > 1:
        raise ValueError(f"{path}: a plain text has one key, but --json-keys names {len(keys)}")
    try:
        return Record({keys[0]: content.decode()}, len(content))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8 ({error})") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files or glob patterns")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="default: text")
    add("--output-prefix", required=True, metavar="PREFIX", help="path without suffix")
    add("--tokenizer-type", choices=["HuggingFaceTokenizer"], default="HuggingFaceTokenizer")
    add("--tokenizer-model", required=True, metavar="PATH", help="tokenizer.json or its folder")
    add("--eod-token", default=END_OF_DOCUMENT, help=f"default: {END_OF_DOCUMENT}")
    add("--append-eod", action="store_true", help="end each document with the --eod-token")
    add(
        "--parse-special-tokens",
        action="store_true",
        help="read special tokens spelled in a text as such, not as ordinary text",
    )
    add("--workers", type=_positive, default=os.cpu_count(), help="threads; default: all cores")
    add("--log-interval", type=_positive, default=1000, help="documents between progress lines")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


if __name__ == "__main__":
    main()
