"""An OpenAI-compatible server that answers by a rule, and lies on request."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from quantkit.evals.canary import SENTENCES

Json = dict[str, Any]

#: Pairs of bytes that English sentences hold: likely here, so that order matters to this "model".
BIGRAMS = {pair for text, _ in SENTENCES for pair in itertools.pairwise(text)}


@dataclass
class Reply:
    """A status, headers, and a body that is sent as it is if it is text."""

    body: Json | str
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0


#: (how many completions were asked before, the honest answer, the request) → what is sent.
Lie = Callable[[int, Json, Json], Reply | Json]


def honest(body: Json, decode: Callable[[int], str]) -> Json:
    """What a server that keeps to the API answers; tokens are named by id."""
    prompt: list[int] = body["prompt"]
    letters = [decode(i) for i in prompt]
    own: list[float | None] = [None]
    own += [-0.5 if p in BIGRAMS else -3.0 for p in itertools.pairwise(letters)]
    written = min(body["max_tokens"], 1)
    kept = len(prompt) if body.get("echo") else 0
    values = own[:kept] + [-0.25] * written
    names = [f"token_id:{i}" for i in prompt[:kept]] + ["token_id:1"] * written
    top = [
        None if v is None else {name: v, "token_id:0": max(v, -0.75)}
        for name, v in zip(names, values, strict=True)
    ]
    logprobs = {"tokens": names, "token_logprobs": values, "top_logprobs": top}
    return {
        "choices": [{"index": 0, "text": "late", "logprobs": logprobs, "finish_reason": "length"}],
        "usage": {"prompt_tokens": len(prompt), "completion_tokens": written},
    }


@contextmanager
def fake_server(
    decode: Callable[[int], str],
    lie: Lie = lambda n, answer, body: answer,
    *,
    models: tuple[str, ...] = ("fake",),
    max_model_len: int | None = 512,
) -> Iterator[str]:
    """The URL of a server in a thread."""
    asked = iter(range(10**9))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                cards = [
                    {"id": m, "owned_by": "fake", "max_model_len": max_model_len} for m in models
                ]
                self.send(Reply({"object": "list", "data": cards}))
            elif self.path == "/version":
                self.send(Reply({"version": "1.2"}))
            else:
                self.send(Reply({"error": {"message": "no such path"}}, 404))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            answer = lie(next(asked), honest(body, decode), body)
            self.send(answer if isinstance(answer, Reply) else Reply(answer))

        def send(self, reply: Reply) -> None:
            time.sleep(reply.delay)
            text = reply.body if isinstance(reply.body, str) else json.dumps(reply.body)
            try:
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())
            except OSError:
                pass  # the client gave up, which some tests are about

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
