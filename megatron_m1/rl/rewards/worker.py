"""The process that a slot's verifications run in; started by ``slots``, which may kill it at any
time.

It reads pickled messages from its parent and answers in JSON, which the parent can read without
trusting what a verifier made of a response. It never imports torch.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from megatron_m1.errors import UserError
from megatron_m1.rl.rewards.config import RewardConfig
from megatron_m1.rl.rewards.registry import Registry
from megatron_m1.rl.rewards.verdict import call

_PR_SET_PDEATHSIG = 1


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    # Verifiers print; the trainer's standard output is not theirs.
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config: RewardConfig = connection.recv()
    _die_with_parent()
    _limit_memory(config.memory_mb)
    registry = Registry(config)
    while True:
        try:
            request = connection.recv()
        except (EOFError, OSError):
            return
        connection.send_bytes(json.dumps(_answer(registry, request)).encode())


def _answer(registry: Registry, request: dict[str, Any]) -> dict[str, Any]:
    """The verdict on a request, or what went wrong; a request without a response only loads the
    verifier, so that the time this takes is not the response's."""
    try:
        function = registry.function(request["data_source"])
        if "solution_str" not in request:
            return {}
        verdict = call(function, request)
        return {"score": verdict.score, "details": verdict.details}
    except UserError as error:
        return {"unusable": str(error)}
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit_memory(megabytes: int) -> None:
    """A soft limit: programs in a sandbox have limits of their own."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = megabytes << 20
    resource.setrlimit(
        resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )


if __name__ == "__main__":
    main()
