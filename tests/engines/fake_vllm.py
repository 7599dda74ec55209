"""An environment with a vLLM in it that is no vLLM: its interpreter, package and server."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

#: What ``-m vllm.entrypoints.openai.api_server`` runs. The first word of ``--marker`` tells it how
#: to misbehave; it writes its arguments and key there.
_SERVER = """
import http.server, json, os, pathlib, signal, sys, time

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
marker = pathlib.Path(flags.pop("--marker"))
mood = marker.read_text().split()[0]
marker.write_text(mood + " " + json.dumps({"pid": os.getpid(), "flags": flags,
                                          "key": os.environ.get("VLLM_API_KEY")}))
print("INFO loading the model", flush=True)
if mood == "crash":
    print("ValueError: No valid quantization kernel", file=sys.stderr, flush=True)
    sys.exit(3)
if mood == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
if mood == "slow":
    time.sleep(60)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply({"/health": {}, "/version": {"version": "0.32.0"}, "/v1/models": {"data": [
            {"id": flags["--served-model-name"], "owned_by": "vllm", "max_model_len": 512}]},
        }[self.path])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        ids = body["prompt"]
        values = [None] + [-1 - (i % 5) / 4 for i in ids[1:]] + [-0.5]
        names = ["token_id:%d" % i for i in ids + [1]]
        self.reply({"choices": [{"text": "x", "logprobs": {
            "tokens": names, "token_logprobs": values,
            "top_logprobs": [None if v is None else {n: v} for n, v in zip(names, values)]}}],
            "usage": {"prompt_tokens": len(ids)}})

    def reply(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass

http.server.ThreadingHTTPServer((flags["--host"], int(flags["--port"])), Handler).serve_forever()
"""


def make_environment(folder: Path, *, name: str = "vllm", version: str = "0.32.0") -> Path:
    """Lay the environment down; returns its interpreter. ``name`` "" leaves vLLM out."""
    packages = folder / "packages"
    server = packages / "vllm" / "entrypoints" / "openai" / "api_server.py"
    server.parent.mkdir(parents=True)
    server.write_text(_SERVER)
    if name:
        facts = packages / f"{name.replace('-', '_')}-{version}.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    python = folder / "python"
    # -S: what is installed beside the tests must not be found in its place.
    python.write_text(
        f'#!/bin/sh\nPYTHONPATH="{packages}" exec "{os.path.realpath(sys.executable)}" -S "$@"\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python
