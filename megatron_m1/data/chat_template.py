"""Conversations as the text that a model reads, by the template that came with its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Conversation = list[dict[str, str]]
ChatTemplate = Callable[[Conversation], str]
"""From a conversation to what the model reads, the beginning of its answer included."""


def load_chat_template(path: str | Path) -> ChatTemplate | None:
    """The template beside a tokenizer.json, in ``chat_template.jinja`` or ``tokenizer_config.json``
    as transformers writes them; None where there is none.

    Args:
        path: the file, or its folder.

    Raises:
        ValueError: the files are damaged.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if not any(
        (folder / name).is_file() for name in ("chat_template.jinja", "tokenizer_config.json")
    ):
        return None
    # Takes seconds to import; few runs have conversations.
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except (OSError, TypeError, KeyError) as error:
        raise ValueError(f"{folder}: the tokenizer's files cannot be read: {error}") from error
    if tokenizer.chat_template is None:
        return None

    def text(conversation: Conversation) -> str:
        return tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )

    return text
