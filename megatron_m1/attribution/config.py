"""The keys of the comparison of rollout and trainer."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_m1.config import LoadConfig
from megatron_m1.config_checks import PRECISIONS, VERIFY, not_among


@dataclass
class MismatchConfig:
    """A checkpoint's model in generation against the same model in training, in one process.

    Attributes:
        tokens: ``.npy`` of [B, T] ids, or ``.jsonl`` with one list of ids (or {"tokens": [...]}) a
            line: the prompts.
        new_tokens: drawn after each prompt, at temperature 1.
        stop_token: ends a response before; null never.
        slots, prefill_tokens: those of the rollout.
        row_tokens: of the trainer's packed rows.
        fp32_lm_head: the head's precision on both sides; null is the checkpoint's.
    """

    checkpoint: LoadConfig = field(default_factory=LoadConfig)
    tokens: str = ""
    new_tokens: int = 32
    stop_token: int | None = None
    slots: int = 16
    prefill_tokens: int = 2048
    row_tokens: int = 4096
    precision: str = "fp32"
    fp32_lm_head: bool | None = None
    seed: int = 1234


def mismatch_problems(config: MismatchConfig, processes: int) -> list[str]:
    """What is wrong with a request for a comparison, before its checkpoint is read."""
    found = not_among("precision", config.precision, PRECISIONS)
    found += not_among("checkpoint.verify", config.checkpoint.verify, VERIFY)
    if not config.checkpoint.load:
        found.append("checkpoint.load is missing: give checkpoint.load=FOLDER of a run")
    if not config.tokens.endswith((".npy", ".jsonl")):
        found.append(f"tokens={config.tokens or 'null'}: give tokens=FILE.npy or tokens=FILE.jsonl")
    found += [
        f"{name}={getattr(config, name)} must be at least 1"
        for name in ("new_tokens", "slots", "prefill_tokens", "row_tokens")
        if getattr(config, name) < 1
    ]
    if processes > 1:
        found.append(f"{processes} processes were started: the comparison runs in one")
    return found
