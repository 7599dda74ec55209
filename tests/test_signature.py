"""Signed checkpoints: any byte that changes is found, by `verify` and before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit import model as models
from quantkit.cli.main import run
from tests.run_helpers import arguments

pytest.importorskip("model_signing", reason="pip install 'quantkit[sign]'")


def key_pair(folder: Path) -> tuple[Path, Path]:
    """(private, public) PEM files of a fresh key on P-256."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder.mkdir()
    private, public = folder / "private.pem", folder / "public.pem"
    key = ec.generate_private_key(ec.SECP256R1())
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return key_pair(tmp_path_factory.mktemp("keys") / "pair")


@pytest.fixture(scope="module")
def signed(
    tiny: Path, traffic: Path, keys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A signed checkpoint."""
    folder = tmp_path_factory.mktemp("signed")
    recipe = folder / "recipe.yaml"
    recipe.write_text("scheme: w8a16\nalgorithm: rtn\nkeep: [lm_head]\n"
                      "calibrate: {samples: 2, seq_len: 32}\n")  # fmt: skip
    assert run(arguments(tiny, recipe, traffic, folder / "out")) == 0
    assert run(["sign", str(folder / "out"), "--key", str(keys[0])]) == 0
    return folder / "out"


@pytest.fixture
def copy(signed: Path, tmp_path: Path) -> Path:
    """One that a test may change."""
    return Path(shutil.copytree(signed, tmp_path / "out"))


def test_an_untouched_checkpoint(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(signed), "--key", str(keys[1]), "--json"]) == 0
    checks = json.loads(capfd.readouterr().out)["checks"]
    assert [check["check"] for check in checks if "signed" in check["detail"]] == ["model.sig"]
    text = tmp_path / "text.txt"
    text.write_text("where is my parcel " * 20)
    argv = ["eval", str(signed), "--text", str(text), "--seq-len", "32", "--max-tokens", "64"]
    assert run([*argv, "--key", str(keys[1])]) == 0


def test_a_flipped_byte_in_any_file(
    copy: Path, keys: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where the manifest's hash is made to fit, and in the signature itself."""
    from quantkit.errors import QuantkitError
    from quantkit.signature import check_signature

    for path in sorted(copy.iterdir()):
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(QuantkitError) as raised:
            check_signature(copy, keys[1])
        assert raised.value.exit_code == 4
        assert path.name in raised.value.message
        path.write_bytes(content)
    check_signature(copy, keys[1])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "modeling.py").write_text("import os"), "modeling.py"),
        (lambda folder: (folder / ".gitattributes").write_text("*"), ".gitattributes"),
        (lambda folder: (folder / "model.sig").unlink(), "has no model.sig"),
        (lambda folder: (folder / "model.sig").write_text("{}"), "is not a signature by"),
        (lambda folder: (folder / "model.sig").write_bytes(b"\xff"), "is not a signature by"),
    ],
    ids=["removed", "added", "added-git", "unsigned", "empty", "garbage"],
)
def test_files_that_come_and_go(
    change: Callable[[Path], object],
    named: str,
    copy: Path,
    keys: tuple[Path, Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    change(copy)
    score, serve = ["eval", str(copy), "--suite", "support_intent"], ["serve", str(copy)]
    # No such interpreter: whoever asks it before looking at the files ends with 2.
    vllm = ["--engine", "vllm", "--engine-python", "/nowhere"]
    for argv in (score, serve, [*score, "--plan"], [*score, *vllm], [*serve, *vllm]):
        port = ["--port", "0"] if argv[0] == "serve" else []
        assert run([*argv, *port, "--key", str(keys[1])]) == 4
        captured = capfd.readouterr()
        assert named in captured.err
        assert "loading" not in captured.err


def test_a_forger_who_also_fits_the_manifest(
    copy: Path, keys: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Hashes alone let it pass; a signature by another key does not help."""
    config = copy / "config.json"
    config.write_text(config.read_text().replace("{", "{ ", 1))
    manifest = json.loads((copy / "quantkit.json").read_text())
    manifest["files"]["config.json"] = models.hash_file(config)
    (copy / "quantkit.json").write_text(json.dumps(manifest))
    assert run(["verify", str(copy), "--no-reload"]) == 0
    assert run(["verify", str(copy), "--no-reload", "--key", str(keys[1])]) == 4
    assert "config.json is not as it was signed (2 files)" in capfd.readouterr().err
    private, _ = key_pair(tmp_path / "forger")
    assert run(["sign", str(copy), "--key", str(private)]) == 0
    assert run(["verify", str(copy), "--no-reload", "--key", str(keys[1])]) == 4
    assert "is not a signature by" in capfd.readouterr().err


def test_an_interrupted_signer_leaves_the_signature_that_was_there(
    copy: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quantkit.signature.os.replace", interrupt)
    assert run(["sign", str(copy), "--key", str(keys[0])]) == 130
    monkeypatch.undo()
    assert run(["verify", str(copy), "--no-reload", "--key", str(keys[1])]) == 0


def test_what_is_not_signed(
    copy: Path, keys: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A damaged checkpoint, or with a key that is none."""
    bad = tmp_path / "bad.pem"
    assert run(["sign", str(copy), "--key", str(bad)]) == 2
    assert "bad.pem: no such file" in capfd.readouterr().err
    bad.write_text("-----BEGIN NOTHING-----")
    assert run(["sign", str(copy), "--key", str(bad)]) == 2
    assert "is not an unencrypted private key" in capfd.readouterr().err
    assert run(["verify", str(copy), "--key", str(bad)]) == 2
    assert "is not an unencrypted public key" in capfd.readouterr().err
    assert run(["eval", "owner/model", "--suite", "support_intent", "--key", str(keys[1])]) == 2
    assert "only the folder of a checkpoint can be signed" in capfd.readouterr().err
    before = (copy / "model.sig").read_bytes()
    (copy / "config.json").write_text("{}")
    assert run(["sign", str(copy), "--key", str(keys[0])]) == 4
    assert "config.json" in capfd.readouterr().err
    assert (copy / "model.sig").read_bytes() == before
