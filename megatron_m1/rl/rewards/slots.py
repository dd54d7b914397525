"""A bounded number of processes for verifications: one that hangs is killed and costs its slot no
more than its time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

from megatron_m1.errors import InputError
from megatron_m1.rl.rewards.config import RewardConfig
from megatron_m1.rl.rewards.verdict import Verdict, VerifierFailed

_ROOT = Path(__file__).resolve().parents[3]
_START_SECONDS = 120.0  # for a process to start and to load a verifier


class VerifierTimeout(VerifierFailed):
    """A verification did not end in time."""


class Slots:
    """Runs verifications, so many at a time; a slot's process starts with its first one."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._own = threading.local()
        self._lock = threading.Lock()
        self._workers: set[_Worker] = set()
        self._closed = False
        self._threads = ThreadPoolExecutor(config.slots, thread_name_prefix="verifier")

    def submit(self, request: dict[str, Any], seconds: float) -> Future[Verdict]:
        """The verdict on a request, whose keys are the names of verl's arguments.

        The future raises VerifierFailed where there is none, and InputError where there cannot be.
        """
        return self._threads.submit(self._verify, request, seconds)

    def close(self) -> None:
        """Kill the processes; verifications that wait are given up."""
        with self._lock:
            self._closed = True
            workers, self._workers = self._workers, set()
        for worker in workers:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.disconnect()

    def _verify(self, request: dict[str, Any], seconds: float) -> Verdict:
        worker = self._worker()
        try:
            # What it takes to load the verifier is not counted as the response's time.
            answer = worker.ask({"data_source": request["data_source"]}, _START_SECONDS)
            if not answer:
                answer = worker.ask(request, seconds)
        except VerifierFailed:
            self._discard(worker)
            raise
        if "unusable" in answer:
            raise InputError(answer["unusable"])
        if "error" in answer:
            raise VerifierFailed(answer["error"])
        return Verdict(answer["score"], answer["details"])

    def _worker(self) -> _Worker:
        """This thread's."""
        worker: _Worker | None = getattr(self._own, "worker", None)
        if worker is None:
            worker = self._own.worker = _Worker(self._config)
            with self._lock:
                if not self._closed:
                    self._workers.add(worker)
                    return worker
            worker.kill()
        return worker

    def _discard(self, worker: _Worker) -> None:
        self._own.worker = None
        with self._lock:
            self._workers.discard(worker)
        worker.kill()
        worker.disconnect()


class _Worker:
    """A process and the connection to it."""

    def __init__(self, config: RewardConfig) -> None:
        self._connection, theirs = Pipe()
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self._connection.send(config)

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """What the process answers; after a failure it is of no more use."""
        try:
            self._connection.send(request)
            if not self._connection.poll(seconds):
                raise VerifierTimeout(f"no verdict after {seconds:g} s")
            answer: dict[str, Any] = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            self.kill()
            raise VerifierFailed(
                f"the verifier's process ended with status {self._process.returncode}"
            ) from error
        return answer

    def kill(self) -> None:
        """End the process, and what a verifier started in it."""
        if self._process.returncode is None:  # else its number may be another's
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def disconnect(self) -> None:
        """When no thread waits for an answer any more."""
        self._connection.close()
