"""A checkpoint's inputs and their licences as a bill of materials in CycloneDX 1.6 JSON.

ECMA-424 (CycloneDX 1.6), with the component types of an ML-BOM: ``machine-learning-model`` for the
checkpoint and its original, ``data`` for calibration text, ``library`` for what computed. It
follows from the manifest alone, so the same checkpoint gives the same document: no date, and a
serial number made from the manifest's hash.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

#: Licence identifiers of model cards (lower case, as the hub writes them) → SPDX.
SPDX: Mapping[str, str] = {
    name.lower(): name
    for name in (
        "Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "ISC", "Unlicense", "MPL-2.0",
        "GPL-2.0-only", "GPL-3.0-only", "LGPL-3.0-only", "AGPL-3.0-only", "Zlib", "BSL-1.0",
        "CC0-1.0", "CC-BY-2.0", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0",
        "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "CC-BY-NC-ND-4.0", "CC-BY-ND-4.0", "ODbL-1.0",
        "PDDL-1.0", "ODC-By-1.0", "EUPL-1.2", "ECL-2.0", "AFL-3.0", "Artistic-2.0", "OSL-3.0",
        "MS-PL", "CDLA-Permissive-1.0", "CDLA-Permissive-2.0", "CDLA-Sharing-1.0",
    )
}  # fmt: skip

_CHECKPOINT, _ORIGINAL = "checkpoint", "original"


def bill_of_materials(
    manifest: Mapping[str, Any], name: str, manifest_sha256: str
) -> dict[str, Any]:
    """The document.

    Args:
        manifest: ``quantkit.json``.
        name: of the checkpoint, for people.
        manifest_sha256: of its file; it names all other files by their hashes.
    """
    data = [_data(i, source) for i, source in enumerate(_sources(manifest))]
    libraries = [_library(*item) for item in sorted((manifest.get("versions") or {}).items())]
    original = _original(manifest["source"])
    inputs = [part["bom-ref"] for part in (original, *data, *libraries)]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, manifest_sha256)}",
        "version": 1,
        "metadata": {
            "tools": {
                "components": [
                    {"type": "application", "name": "quantkit", "version": manifest["quantkit"]}
                ]
            },
            "component": _checkpoint(manifest, name, manifest_sha256, data),
        },
        "components": [original, *data, *libraries],
        "dependencies": [{"ref": _CHECKPOINT, "dependsOn": inputs}],
    }


def _checkpoint(
    manifest: Mapping[str, Any], name: str, sha256: str, data: list[dict[str, Any]]
) -> dict[str, Any]:
    files = {**manifest["files"], "quantkit.json": sha256}
    recipe = manifest.get("recipe") or {}
    return {
        "type": "machine-learning-model",
        "bom-ref": _CHECKPOINT,
        "name": name,
        # A checkpoint is a derived work: it is under its original's licence, whatever else.
        "licenses": _licenses(manifest["source"].get("license")),
        "pedigree": {
            "ancestors": [
                {
                    "type": "machine-learning-model",
                    "name": str(manifest["source"].get("name")),
                    "licenses": _licenses(manifest["source"].get("license")),
                }
            ],
            "notes": f"quantized by quantkit {manifest['quantkit']}, recipe {recipe.get('name')}",
        },
        "modelCard": {"modelParameters": {"datasets": [{"ref": part["bom-ref"]} for part in data]}},
        "components": _files(_CHECKPOINT, files),
        "properties": _properties(
            {
                "bits_per_weight": manifest.get("bits_per_weight"),
                "recipe_sha256": recipe.get("sha256"),
                "plan_sha256": manifest.get("plan"),
            }
        ),
    }


def _original(source: Mapping[str, Any]) -> dict[str, Any]:
    name = str(source.get("name"))
    found: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": _ORIGINAL,
        "name": name,
        "licenses": _licenses(source.get("license")),
        "components": _files(_ORIGINAL, source["files"]),
        "properties": _properties(
            {"weights_sha256": source["hash"], "license_from": source.get("license_from")}
        ),
    }
    if name.count("/") == 1:
        found["purl"] = f"pkg:huggingface/{name}"
    return found


def _data(index: int, source: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "data",
        "bom-ref": f"data-{index}",
        "name": str(source.get("id") or source.get("name")),
        "licenses": _licenses(source.get("license")),
        "hashes": _sha256(source["sha256"]),
        "data": [{"type": "dataset", "name": str(source.get("name"))}],
        "properties": _properties({"documents": source["documents"], "tokens": source["tokens"]}),
    }


def _library(name: str, version: str | None) -> dict[str, Any]:
    found = {"type": "library", "bom-ref": f"pypi-{name}", "name": name}
    if version:
        found |= {"version": version, "purl": f"pkg:pypi/{name}@{version}"}
    return found


def _files(owner: str, files: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "type": "file",
            "bom-ref": f"{owner}/{name}",
            "name": name,
            "hashes": _sha256(digest),
        }
        for name, digest in sorted(files.items())
    ]


def _licenses(license: str | None) -> list[dict[str, Any]]:
    """As SPDX where the identifier is one; by its name otherwise, ``unknown`` included."""
    named = str(license or "unknown")
    spdx = SPDX.get(named.lower())
    return [{"license": {"id": spdx} if spdx else {"name": named}}]


def _sha256(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest}]


def _properties(facts: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {"name": f"quantkit:{key}", "value": str(value)}
        for key, value in facts.items()
        if value is not None
    ]


def _sources(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return (manifest.get("data") or {}).get("sources") or []
