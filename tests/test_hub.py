"""Models by hub id: download, load, quantize; from the cache; and ids that nobody has.

huggingface_hub reads its settings when it is imported, so each command is a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import TinyHub, serving
from tests.run_helpers import arguments, contents


@pytest.fixture
def hub(tiny: Path, tmp_path: Path) -> Iterator[TinyHub]:
    """A hub with ``acme/tiny`` and ``tiny``: the tiny model and, as real repositories have them,
    other files."""
    folder = Path(shutil.copytree(tiny, tmp_path / "repository"))
    (folder / "pytorch_model.bin").write_bytes(b"pickled weights are never read")
    (folder / "README.md").write_text("# tiny\n")
    with serving({"acme/tiny": folder, "tiny": folder}) as server:
        yield server


def through(
    hub: TinyHub, cache: Path, *argv: str, check: bool = False
) -> subprocess.CompletedProcess[str]:
    """A Python process that knows no hub but this one."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
        and not name.lower().endswith("_proxy")
    }
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, *argv], env=environment, capture_output=True, text=True, check=check
    )


def quantkit(hub: TinyHub, cache: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return through(hub, cache, "-m", "quantkit.cli.main", *argv)


LOAD = """
import sys, torch
from quantkit import model as models

ids = torch.arange(1, 33).reshape(1, -1)
fetched, local = (models.load_source(source) for source in sys.argv[1:])
with torch.no_grad():
    logits = fetched.model(ids).logits
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, local.model(ids).logits)
assert fetched.weight_hash == local.weight_hash
assert fetched.tokenizer.chat_template == local.tokenizer.chat_template
"""


@pytest.mark.parametrize("name", ["acme/tiny", "tiny"])
def test_an_id_is_downloaded_and_loaded(
    name: str, hub: TinyHub, tiny: Path, tmp_path: Path
) -> None:
    done = through(hub, tmp_path / "cache", "-c", LOAD, name, str(tiny))
    assert done.returncode == 0, done.stderr
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= hub.downloads()
    assert "pytorch_model.bin" not in hub.downloads()


def test_a_run_by_id_gives_the_bytes_of_a_run_on_the_folder(
    hub: TinyHub, tiny: Path, traffic: Path, recipe: Path, tmp_path: Path
) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out"
    planned = quantkit(
        hub, cache, *arguments("acme/tiny", recipe, traffic, out, "--dry-run", "--json")
    )
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["bits_per_weight"] == pytest.approx(4.25)
    assert not out.exists()
    hub.requests.clear()
    done = quantkit(hub, cache, *arguments("acme/tiny", recipe, traffic, out))
    assert done.returncode == 0, done.stderr
    assert hub.downloads() == set()  # the cache had them
    local = quantkit(hub, cache, *arguments(tiny, recipe, traffic, tmp_path / "local"))
    assert local.returncode == 0, local.stderr
    by_id, by_folder = contents(out), contents(tmp_path / "local")
    manifests = [json.loads(files.pop("quantkit.json")) for files in (by_id, by_folder)]
    assert by_id == by_folder
    # The manifest says by which name the model was asked for, too.
    sources = [manifest.pop("source") for manifest in manifests]
    assert manifests[0] == manifests[1]
    assert sources[0]["hash"] == sources[1]["hash"]
    inspected = quantkit(hub, cache, "inspect", str(out), "--json")
    assert len(json.loads(inspected.stdout)["layers"]) == 14


def test_a_cached_id_needs_no_hub(
    hub: TinyHub, traffic: Path, recipe: Path, tmp_path: Path
) -> None:
    argv = arguments("acme/tiny", recipe, traffic, tmp_path / "out", "--dry-run")
    assert quantkit(hub, tmp_path / "cache", *argv).returncode == 0
    hub.shutdown()
    hub.server_close()
    done = quantkit(hub, tmp_path / "cache", *argv)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["acme/missing", "missing"])
@pytest.mark.parametrize("command", ["calibrate", "eval"])
def test_an_id_that_the_hub_does_not_have(
    command: str, name: str, hub: TinyHub, traffic: Path, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    argv = {
        "calibrate": arguments(name, recipe, traffic, out, "--dry-run"),
        "eval": ["eval", name, "--text", str(traffic)],
    }[command]
    done = quantkit(hub, tmp_path / "cache", *argv)
    assert done.returncode == 2
    readings = f"{name}: neither a local folder, a .gguf file nor a model that the hub gave"
    assert readings in done.stderr
    assert "check the name, the network and your hub token" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()
    assert any(f"/api/models/{name}" in path for _, path in hub.requests)
