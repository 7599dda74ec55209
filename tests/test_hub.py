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

from quantkit.cli.main import run
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
*names, folder = sys.argv[1:]
local = models.load_source(folder)
for name in names:
    fetched = models.load_source(name)
    with torch.no_grad():
        logits = fetched.model(ids).logits
        assert torch.isfinite(logits).all()
        assert torch.equal(logits, local.model(ids).logits)
    assert fetched.weight_hash == local.weight_hash
    assert fetched.tokenizer.chat_template == local.tokenizer.chat_template
"""


def test_an_id_is_downloaded_and_loaded(hub: TinyHub, tiny: Path, tmp_path: Path) -> None:
    """One with an owner, and one without."""
    done = through(hub, tmp_path / "cache", "-c", LOAD, "acme/tiny", "tiny", str(tiny))
    assert done.returncode == 0, done.stderr
    for name in ("acme/tiny", "tiny"):
        downloads = hub.downloads(name)
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= downloads
        assert "pytorch_model.bin" not in downloads


def test_a_run_by_id_gives_the_bytes_of_a_run_on_the_folder(
    hub: TinyHub,
    tiny: Path,
    traffic: Path,
    recipe: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Once its files are in the cache, no hub is needed."""
    cache, out = tmp_path / "cache", tmp_path / "out"
    dry_run = arguments("acme/tiny", recipe, traffic, out, "--dry-run", "--json")
    planned = quantkit(hub, cache, *dry_run)
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["bits_per_weight"] == pytest.approx(4.25)
    assert not out.exists()
    hub.requests.clear()
    done = quantkit(hub, cache, *arguments("acme/tiny", recipe, traffic, out))
    assert done.returncode == 0, done.stderr
    assert hub.downloads("acme/tiny") == set()  # the cache had them
    hub.shutdown()
    hub.server_close()
    alone = quantkit(hub, cache, *dry_run)
    assert alone.returncode == 0, alone.stderr
    # Without a hub, and so in this process.
    assert run(arguments(tiny, recipe, traffic, tmp_path / "local")) == 0
    by_id, by_folder = contents(out), contents(tmp_path / "local")
    manifests = [json.loads(files.pop("quantkit.json")) for files in (by_id, by_folder)]
    assert by_id == by_folder
    # The manifest says by which name the model was asked for, too.
    sources = [manifest.pop("source") for manifest in manifests]
    assert manifests[0] == manifests[1]
    assert sources[0]["hash"] == sources[1]["hash"]
    capfd.readouterr()
    assert run(["inspect", str(out), "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)["layers"]) == 14


#: Command lines as JSON, one after the other; each ends with its exit code on stderr.
RUN = """
import json, sys
from quantkit.cli.main import run

for argv in json.loads(sys.argv[1]):
    print("exit", run(argv), file=sys.stderr, flush=True)
"""


def test_an_id_that_the_hub_does_not_have(
    hub: TinyHub, traffic: Path, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    names = ("acme/missing", "missing")
    commands = [
        argv
        for name in names
        for argv in (
            arguments(name, recipe, traffic, out, "--dry-run"),
            ["eval", name, "--text", str(traffic)],
        )
    ]
    done = through(hub, tmp_path / "cache", "-c", RUN, json.dumps(commands), check=True)
    said = done.stderr.split("exit 2\n")
    assert said.pop() == ""
    assert len(said) == len(commands), done.stderr
    for argv, err in zip(commands, said, strict=True):
        readings = f"{argv[1]}: neither a local folder, a .gguf file nor a model that the hub gave"
        assert readings in err
        assert "check the name, the network and your hub token" in err
        assert "Traceback" not in err
    assert not out.exists()
    for name in names:
        asked = [path for _, path in hub.requests if path.startswith(f"/api/models/{name}")]
        assert len(asked) >= 2
