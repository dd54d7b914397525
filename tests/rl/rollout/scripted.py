"""A server on loopback that answers ``/v1/completions`` as it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any]
"""A status, and JSON or raw bytes; status 0 hangs up."""
Script = Callable[[int, dict[str, Any]], Answer]
"""From the number of the request, and its body."""


@contextmanager
def server(script: Script) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its URL, and the bodies that it was sent."""
    bodies: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/completions"
            with lock:
                number = len(bodies)
                bodies.append(body)
            status, content = script(number, body)
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

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.daemon_threads = True
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{found.server_port}", bodies
    finally:
        found.shutdown()
        found.server_close()
        thread.join()
