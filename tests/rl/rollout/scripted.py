"""A server on loopback that answers as it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any]
"""A status, and JSON or raw bytes; status 0 hangs up."""
Script = Callable[[int, dict[str, Any]], Answer]
"""From the number of the request, and its body."""


@dataclass
class Scripted:
    """Its address, the completions that it was asked for, and what else it was told, by path."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    told: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)


def taken(number: int, body: dict[str, Any]) -> Answer:
    """How a server takes weights."""
    return 200, {}


@contextmanager
def server(script: Script, telling: Script = taken) -> Iterator[Scripted]:
    """``script`` answers ``/v1/completions``, ``telling`` everything else."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            is_completion = self.path == "/v1/completions"
            with lock:
                number = len(seen.bodies if is_completion else seen.told)
                seen.keys.add(self.headers["Authorization"])
                if is_completion:
                    seen.bodies.append(body)
                else:
                    seen.told.append((self.path, body))
            self._answer(*(script if is_completion else telling)(number, body))

        def _answer(self, status: int, content: Any) -> None:
            if status == 0:
                self.close_connection = True
                return
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *arguments: Any) -> None:
            """Nothing."""

        def handle(self) -> None:
            # A client that gave up has closed the connection.
            with suppress(BrokenPipeError, ConnectionResetError):
                super().handle()

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.daemon_threads = True
    seen = Scripted(f"http://127.0.0.1:{found.server_port}")
    thread = threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        found.shutdown()
        found.server_close()
        thread.join()
