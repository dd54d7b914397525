"""A server with OpenAI's chat interface on loopback, whose answers a test writes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Reply:
    """What the server answers: a status and a body, slowly where ``pauses`` lie between its bytes.

    ``text`` becomes a chat completion.
    """

    text: str | None = None
    status: int = 200
    body: bytes = b""
    delay: float = 0.0
    pause: float = 0.0

    @property
    def data(self) -> bytes:
        if self.text is None:
            return self.body
        message = {"role": "assistant", "content": self.text}
        return json.dumps({"choices": [{"index": 0, "message": message}]}).encode()


@dataclass
class JudgeServer:
    """Its address, and what it was asked."""

    url: str
    questions: list[str] = field(default_factory=list)
    requests: list[dict[str, object]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


@contextmanager
def judge_server(answer: Callable[[str, int], Reply]) -> Iterator[JudgeServer]:
    """Serve ``answer(question, number of the request)``."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions"
            with lock:
                seen.requests.append(asked)
                seen.keys.append(self.headers.get("Authorization"))
                seen.questions.append(asked["messages"][0]["content"])
                number = len(seen.questions)
            reply = answer(seen.questions[number - 1], number)
            time.sleep(reply.delay)
            self.send_response(reply.status)
            self.send_header("Content-Length", str(len(reply.data)))
            self.end_headers()
            step = 1 if reply.pause else max(len(reply.data), 1)
            for start in range(0, len(reply.data), step):
                self.wfile.write(reply.data[start : start + step])
                time.sleep(reply.pause)

        def log_message(self, *_: object) -> None:
            pass

        def handle(self) -> None:
            # A client that gave up has closed the connection.
            with suppress(BrokenPipeError, ConnectionResetError):
                super().handle()

    lock = threading.Lock()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    seen = JudgeServer(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
