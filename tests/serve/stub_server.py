"""A server that says what a test tells it to, over HTTP."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

EVENT = (
    b'data: {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}]}\n\n'
)


class Stub:
    """A server that gives one answer to everything and remembers what it was asked.

    Args:
        status, media_type, body: the answer.
        length: what it says of the body's length, None for the truth.
        models: what it answers to GET, if that is something else: JSON.
    """

    def __init__(
        self, status: int, media_type: str, body: bytes, length: int | None, models: bytes | None
    ) -> None:
        stub = self
        self.requests: list[tuple[str, str, bytes]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if models is None:
                    self._answer(status, media_type, body)
                else:
                    self._answer(200, "application/json", models)

            def do_POST(self) -> None:
                self._answer(status, media_type, body)

            def _answer(self, status: int, media_type: str, body: bytes) -> None:
                read = self.rfile.read(int(self.headers.get("content-length", 0)))
                stub.requests.append((self.path, self.headers.get("authorization", ""), read))
                self.send_response(status)
                self.send_header("content-type", media_type)
                self.send_header("location", f"{stub.url}/elsewhere")
                self.send_header("content-length", str(len(body) if length is None else length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@contextmanager
def answering(
    status: int = 200,
    media_type: str = "text/event-stream",
    body: bytes = EVENT + b"data: [DONE]\n\n",
    length: int | None = None,
    models: bytes | None = None,
) -> Iterator[Stub]:
    """A `Stub` on a socket."""
    stub = Stub(status, media_type, body, length, models)
    thread = threading.Thread(target=stub.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        stub.server.shutdown()
        stub.server.server_close()
        thread.join(5)
