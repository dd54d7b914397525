"""Responses that were paid for, on disk as soon as they are finished.

A file a step, ``rollouts/step_000012.jsonl`` beside the checkpoints: a line for each response and
one for its reward. A run that goes on from an earlier checkpoint takes the same steps again, finds
its responses here, and pays for those alone that are missing. Lines are handed to the system at
once, so a killed process loses none; the disk is waited for once a second, so a machine that stops
loses a second.
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_m1.rl.samples import Response

Key = tuple[int, int]
"""Prompt and index in its group."""
_SYNC_SECONDS = 1.0


class Journal:
    """The file of one step, open for appending.

    Attributes:
        responses, rewards: what it held when it was opened.
    """

    def __init__(self, folder: Path, step: int, fingerprint: str) -> None:
        """Read what is there and open it.

        Args:
            fingerprint: of all that draws depend on; a file of another is replaced.

        Raises:
            OSError: it cannot be read or written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = step_file(folder, step)
        self.responses: dict[Key, Response] = {}
        self.rewards: dict[Key, dict[str, Any]] = {}
        self._synced = 0.0
        if not self._read(fingerprint):
            self.path.write_text(json.dumps({"fingerprint": fingerprint}) + "\n")
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def add_response(self, response: Response) -> None:
        self._append({"response": encode(response)})

    def add_reward(self, key: Key, reward: dict[str, Any]) -> None:
        """Plain values of a scored response."""
        self._append({"key": list(key), "reward": reward})

    def close(self) -> None:
        os.fsync(self._file)
        os.close(self._file)

    def _append(self, line: dict[str, Any]) -> None:
        data = (json.dumps(line) + "\n").encode()
        while data:
            # A disk that fills up takes a part: the rest raises, and half a line is cut off later.
            data = data[os.write(self._file, data) :]
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def _read(self, fingerprint: str) -> bool:
        """Whether the file is of this run; what it holds."""
        if not self.path.exists():
            return False
        whole = self.path.read_bytes()
        # A process that died while it wrote left half a line.
        end = whole.rfind(b"\n") + 1
        os.truncate(self.path, end)
        lines = _lines(whole[:end])
        if next(lines, {}).get("fingerprint") != fingerprint:
            return False
        for line in lines:
            if "response" in line:
                response = decode(line["response"])
                self.responses[response.prompt_id, response.index] = response
            elif "reward" in line:
                prompt, index = line["key"]
                self.rewards[prompt, index] = line["reward"]
        return True


def step_file(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}.jsonl"


def forget(folder: Path, before: int) -> None:
    """Remove the files of steps before ``before``, which no checkpoint needs."""
    for path in folder.glob("step_*.jsonl"):
        number = path.stem.removeprefix("step_")
        if number.isdigit() and int(number) < before:
            path.unlink(missing_ok=True)


def encode(response: Response) -> dict[str, Any]:
    """Plain values of a response."""
    return {
        "prompt_id": response.prompt_id,
        "index": response.index,
        "tokens": response.tokens,
        "logprobs": response.logprobs,
        "raw_logprobs": response.raw_logprobs,
        "versions": response.versions,
        "finish": response.finish,
        "experts": None if response.experts is None else _encode_experts(response.experts),
    }


def decode(values: dict[str, Any]) -> Response:
    experts = values["experts"]
    return Response(**{**values, "experts": None if experts is None else _decode_experts(experts)})


def _encode_experts(experts: Tensor) -> dict[str, Any]:
    raw = experts.to(torch.int16).contiguous().numpy().tobytes()
    return {"shape": list(experts.shape), "int16": base64.b64encode(raw).decode()}


def _decode_experts(values: dict[str, Any]) -> Tensor:
    raw = bytearray(base64.b64decode(values["int16"]))
    return torch.frombuffer(raw, dtype=torch.int16).reshape(values["shape"])


def _lines(text: bytes) -> Iterator[dict[str, Any]]:
    """Its lines, without those that a full disk cut in the middle of the file."""
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
