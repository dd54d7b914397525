"""Byte-level BPE tokenizer: text to token ids and back, and training one from text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_m1.files import whole

END_OF_DOCUMENT = "<|endoftext|>"
_BYTES = 256


class Tokenizer:
    """A `tokenizers.Tokenizer` with an end-of-document token, `eod`.

    Raises ValueError when the vocabulary lacks the end-of-document token.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eod_token: str = END_OF_DOCUMENT) -> None:
        eod = backend.token_to_id(eod_token)
        if eod is None:
            special = [t.content for t in backend.get_added_tokens_decoder().values() if t.special]
            raise ValueError(
                f"the tokenizer has no token {eod_token} to end a document with; name the one it "
                f"uses, among its special tokens {', '.join(special) or '(none)'}"
            )
        self._backend = backend
        self.eod: int = eod

    @classmethod
    def load(cls, path: str | Path, eod_token: str = END_OF_DOCUMENT) -> Tokenizer:
        """Read a Hugging Face tokenizer.json, or the one in a folder.

        Raises FileNotFoundError, or ValueError when the file is not a tokenizer.
        """
        path = _file(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: give a tokenizer.json or its folder")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{path} is not a tokenizer: {error}") from error
        return cls(backend, eod_token)

    def save(self, path: str | Path) -> None:
        """Write `path`, or tokenizer.json inside it when it does not end in .json."""
        path = _file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            partial.write_text(self._backend.to_str(pretty=True), encoding="utf-8")

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self._backend.get_vocab().values()) + 1

    @property
    def sha256(self) -> str:
        """Of everything that defines the tokenizer."""
        return sha256(self._backend.to_str().encode()).hexdigest()

    def is_written_in(self, content: bytes) -> bool:
        """Whether a tokenizer.json with this content is this tokenizer."""
        try:
            other = tokenizers.Tokenizer.from_buffer(content)
        except Exception:  # the library raises a bare Exception
            return False
        return other.to_str() == self._backend.to_str()

    def encode(self, text: str, parse_special: bool = True) -> list[int]:
        """Token ids of a text. Without `parse_special`, a text that spells a special token gets
        that spelling's ordinary tokens: what documents and users write cannot end a document."""
        return self.encode_batch([text], parse_special)[0]

    def encode_batch(self, texts: Sequence[str], parse_special: bool = True) -> list[list[int]]:
        """Token ids of each text, worked out on all cores."""
        self._backend.encode_special_tokens = not parse_special
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def decode_stream(self, skip_special: bool = False) -> TextStream:
        """Decoding of tokens one at a time, as they are generated."""
        return TextStream(self._backend, skip_special)


class TextStream:
    """Turns a growing sequence of tokens into pieces of text that never split a character."""

    def __init__(self, backend: tokenizers.Tokenizer, skip_special: bool) -> None:
        self._backend, self._skip_special = backend, skip_special
        self._stream = decoders.DecodeStream(skip_special_tokens=skip_special)
        self._waiting: list[int] = []

    def step(self, token: int) -> str:
        """The text that `token` completes; empty while a character waits for its last bytes."""
        self._waiting.append(token)
        text = self._stream.step(self._backend, token) or ""
        if text:
            self._waiting.clear()
        return text

    def finish(self) -> str:
        """What is still waiting after the last token, U+FFFD for a character cut short."""
        return self._backend.decode(self._waiting, skip_special_tokens=self._skip_special)


def train_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (END_OF_DOCUMENT,)
) -> Tokenizer:
    """Learn a byte-level BPE of at most `vocab_size` tokens (fewer when the texts are few).

    The first special token ends documents; special tokens take the ids from 0.
    Raises ValueError when `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    special_tokens = list(special_tokens)
    if not special_tokens:
        raise ValueError("special_tokens is empty; the first one ends documents")
    if vocab_size < _BYTES + len(special_tokens):
        raise ValueError(
            f"vocab_size is {vocab_size}; {_BYTES} bytes and {len(special_tokens)} special tokens "
            f"need at least {_BYTES + len(special_tokens)}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, special_tokens[0])


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / "tokenizer.json"
