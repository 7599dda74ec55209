"""The bill of materials has the structure that CycloneDX 1.6 (ECMA-424) requires."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from quantkit.cli.main import run
from quantkit.sbom import SPDX, bill_of_materials
from tests.run_helpers import arguments

#: bom-1.6.schema.json, as far as quantkit writes it: what an object must and may hold.
REQUIRED = {"bom": {"bomFormat", "specVersion"}, "component": {"type", "name"}}
ALLOWED = {
    "bom": {
        *("$schema", "bomFormat", "specVersion", "serialNumber", "version", "metadata"),
        *("components", "services", "externalReferences", "dependencies", "compositions"),
        *("vulnerabilities", "annotations", "formulation", "declarations", "definitions"),
        *("properties", "signature"),
    },
    "component": {
        *("type", "mime-type", "bom-ref", "supplier", "manufacturer", "authors", "author"),
        *("publisher", "group", "name", "version", "description", "scope", "hashes", "licenses"),
        *("copyright", "cpe", "purl", "omniborId", "swhid", "swid", "modified", "pedigree"),
        *("externalReferences", "components", "evidence", "releaseNotes", "modelCard", "data"),
        *("cryptoProperties", "properties", "tags", "signature"),
    },
    "pedigree": {"ancestors", "descendants", "variants", "commits", "patches", "notes"},
    "componentData": {
        *("bom-ref", "type", "name", "contents", "classification", "sensitiveData"),
        *("graphics", "description", "governance"),
    },
    "dependency": {"ref", "dependsOn", "provides"},
}
TYPES = {
    *("application", "framework", "library", "container", "platform", "operating-system"),
    *("device", "device-driver", "firmware", "file", "machine-learning-model", "data"),
    "cryptographic-asset",
}
SERIAL = re.compile(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
SHA256 = re.compile(r"[a-fA-F0-9]{64}")

MANIFEST: dict[str, Any] = {
    "quantkit": "1.2.3",
    "source": {
        "name": "owner/model",
        "hash": "a" * 64,
        "files": {"model.safetensors": "b" * 64},
        "license": "apache-2.0",
        "license_from": "README.md",
    },
    "recipe": {"name": "mine", "sha256": "c" * 64, "text": "scheme: w8a16"},
    "plan": "d" * 64,
    "bits_per_weight": 8.25,
    "data": {
        "sources": [
            {
                "name": "traffic.jsonl",
                "id": None,
                "sha256": "e" * 64,
                "license": "unknown",
                "documents": 3,
                "tokens": 64,
            }
        ]
    },
    "versions": {"torch": "2.13.0", "numpy": None},
    "files": {"model.safetensors": "f" * 64},
}


def check(document: dict[str, Any]) -> set[str]:
    """Assert the structure; returns every bom-ref."""
    _keys(document, "bom")
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    assert SERIAL.fullmatch(document["serialNumber"])
    assert isinstance(document["version"], int)
    assert document["version"] >= 1
    refs: list[str] = []
    for component in (document["metadata"]["component"], *document["components"]):
        _component(component, refs)
    for tool in document["metadata"]["tools"]["components"]:
        _component(tool, [])
    assert len(refs) == len(set(refs)), "a bom-ref must be unique in the document"
    for dependency in document["dependencies"]:
        _keys(dependency, "dependency")
        assert {dependency["ref"], *dependency["dependsOn"]} <= set(refs)
    return set(refs)


def _keys(thing: dict[str, Any], kind: str) -> None:
    assert REQUIRED.get(kind, set()) <= thing.keys() <= ALLOWED[kind], (kind, thing.keys())


def _component(component: dict[str, Any], refs: list[str]) -> None:
    _keys(component, "component")
    assert component["type"] in TYPES
    assert isinstance(component["name"], str)
    if "bom-ref" in component:
        refs.append(component["bom-ref"])
    for entry in component.get("licenses", ()):
        assert entry.keys() == {"license"}
        assert len(entry["license"].keys() & {"id", "name"}) == 1  # exactly one of the two
        if "id" in entry["license"]:
            assert entry["license"]["id"] in SPDX.values()
    for entry in component.get("hashes", ()):
        assert entry["alg"] == "SHA-256"
        assert SHA256.fullmatch(entry["content"])
    for entry in component.get("properties", ()):
        assert entry.keys() == {"name", "value"}
        assert isinstance(entry["value"], str)
    for entry in component.get("data", ()):
        _keys(entry, "componentData")
        assert entry["type"] in {"source-code", "configuration", "dataset", "definition", "other"}
    if "pedigree" in component:
        _keys(component["pedigree"], "pedigree")
        for ancestor in component["pedigree"]["ancestors"]:
            _component(ancestor, refs)
    for nested in component.get("components", ()):
        _component(nested, refs)


def test_the_document_of_a_run(
    tiny: Path, traffic: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("scheme: w8a16\nalgorithm: rtn\nkeep: [lm_head]\n"
                      "calibrate: {samples: 2, seq_len: 32}\n")  # fmt: skip
    out = tmp_path / "out"
    assert run(arguments(model, recipe, traffic, out)) == 0
    files = [tmp_path / "a.cdx.json", tmp_path / "b.cdx.json"]
    for file in files:
        assert run(["inspect", str(out), "--sbom", str(file)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    document = json.loads(files[0].read_text())
    check(document)
    found = {component["bom-ref"]: component for component in document["components"]}
    assert found["original"]["type"] == "machine-learning-model"
    assert found["original"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert found["data-0"]["type"] == "data"
    assert found["data-0"]["licenses"] == [{"license": {"name": "unknown"}}]
    assert found["data-0"]["hashes"][0]["content"] == (
        hashlib.sha256(traffic.read_bytes()).hexdigest()
    )
    assert found["pypi-torch"]["purl"].startswith("pkg:pypi/torch@")
    listed = document["metadata"]["component"]["components"]
    digests = {part["name"]: part["hashes"][0]["content"] for part in listed}
    assert digests == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()
    }
    assert str(tmp_path) not in files[0].read_text()
    # A file of its own in the checkpoint would be one that the manifest does not list.
    capfd.readouterr()
    assert run(["inspect", str(out), "--sbom", str(out / "sbom.cdx.json")]) == 2
    assert "write the bill of materials beside it" in capfd.readouterr().err
    assert run(["verify", str(out), "--no-reload"]) == 0


def test_a_hub_model_and_its_dependencies() -> None:
    document = bill_of_materials(MANIFEST, "out", "0" * 64)
    refs = check(document)
    assert {"checkpoint", "original", "data-0", "pypi-torch", "pypi-numpy"} <= refs
    original = document["components"][0]
    assert original["purl"] == "pkg:huggingface/owner/model"
    assert document["dependencies"][0]["dependsOn"] == [
        *("original", "data-0", "pypi-numpy", "pypi-torch")
    ]
    datasets = document["metadata"]["component"]["modelCard"]["modelParameters"]["datasets"]
    assert datasets == [{"ref": "data-0"}]


@pytest.mark.parametrize(
    ("named", "license"),
    [
        ("mit", {"id": "MIT"}),
        ("cc-by-sa-4.0", {"id": "CC-BY-SA-4.0"}),
        ("llama3.1", {"name": "llama3.1"}),
        ("unknown", {"name": "unknown"}),
        (None, {"name": "unknown"}),
    ],
)
def test_licences(named: str | None, license: dict[str, str]) -> None:
    manifest = {**MANIFEST, "source": {**MANIFEST["source"], "license": named}, "data": None}
    document = bill_of_materials(manifest, "out", "1" * 64)
    check(document)
    assert document["components"][0]["licenses"] == [{"license": license}]
    assert document["metadata"]["component"]["licenses"] == [{"license": license}]


def test_the_serial_number_follows_from_the_manifest() -> None:
    first, again, other = (
        bill_of_materials(MANIFEST, "out", digit * 64)["serialNumber"] for digit in "001"
    )
    assert first == again != other
