"""From the data section of a configuration to a stream of prompts and the tokenizer."""

from __future__ import annotations

from typing import Any

from megatron_m1.checkpoint.folders import from_latest, given_by
from megatron_m1.data.chat_template import load_chat_template
from megatron_m1.data.tokenizer import Tokenizer, train_bpe
from megatron_m1.errors import ConfigError, InputError
from megatron_m1.rl.config import RLConfig, TaskConfig
from megatron_m1.rl.prompts import BlendedPrompts, FilePrompts, Prompts, TaskPrompts
from megatron_m1.rl.tasks import Task, make_task

BYTES = "bytes"


def open_prompts(config: RLConfig, seed: int) -> Prompts:
    """The prompts of a run; conversations go through the template beside its tokenizer.

    Raises:
        ConfigError: a task that there is not, or a knob that it has not.
        InputError: a file that cannot be read, or conversations without a template.
    """
    data = config.data
    if data.files:
        where = _tokenizer_path(config)
        try:
            template = load_chat_template(where) if where else None
        except ValueError as error:
            raise InputError(f"data.tokenizer={data.tokenizer or 'null'}: {error}") from error
        return FilePrompts(data.files, seed, chat_template=template)
    streams = [TaskPrompts(task_of(task), seed) for task in data.tasks]
    try:
        return BlendedPrompts(streams, [task.weight for task in data.tasks])
    except ValueError as error:
        raise ConfigError([f"data.tasks: {error}"]) from error


def task_of(task: TaskConfig) -> Task:
    """The generator that a configuration describes.

    Raises:
        ConfigError: there is none, or it has not such a knob.
    """
    try:
        return make_task(
            task.name, task.difficulty, **{name: _value(text) for name, text in task.knobs.items()}
        )
    except ValueError as error:
        raise ConfigError([f"data.tasks: {error}"]) from error


def _value(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


def open_tokenizer(config: RLConfig) -> Tokenizer:
    """The tokenizer of a run: given, or in the checkpoint that it starts from.

    Raises:
        InputError: there is none, or it has tokens that the model does not know.
    """
    tokenizer = _tokenizer(config)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise InputError(
            f"data.tokenizer has {tokenizer.vocab_size} tokens, but model.vocab_size="
            f"{config.model.vocab_size}: give the tokenizer that the model was trained with"
        )
    return tokenizer


def _tokenizer(config: RLConfig) -> Tokenizer:
    eod, where = config.data.eod, _tokenizer_path(config)
    if where is None:
        return train_bpe([], 257, [eod])
    try:
        return Tokenizer.load(where, eod)
    except (OSError, ValueError) as error:
        raise InputError(f"data.tokenizer={config.data.tokenizer or 'null'}: {error}") from error


def _tokenizer_path(config: RLConfig) -> str | None:
    """Where the tokenizer is; None for that of bytes."""
    if config.data.tokenizer == BYTES:
        return None
    return config.data.tokenizer or str(_starting_checkpoint(config))


def _starting_checkpoint(config: RLConfig) -> Any:
    own = from_latest(config.checkpoint_dir)
    if own:
        return own[0]
    if config.checkpoint.load:
        return given_by(config.checkpoint.load)[0]
    raise InputError(
        "data.tokenizer=null is the checkpoint's, and there is none: give checkpoint.load=FOLDER "
        "of a trained model, or data.tokenizer=FILE"
    )
