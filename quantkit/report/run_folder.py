"""Reading a run's folder: JSON files → one `Run`, every number checked on the way in.

The sections and plots that follow work on typed, finite values and never look at JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import UsageError
from quantkit.results import Flip, GateCheck, Outcome, Results, Verdict, read_json

#: What beside ``OUT`` may be given in place of ``OUT.run``.
_SIBLINGS = (".rejected", ".run")


@dataclass(frozen=True)
class InputRange:
    """The range behind a static activation scale.

    Attributes:
        observer: label of the observer that found it.
        low, high: in units of the input.
        errors: label → output error of every candidate.
    """

    observer: str
    low: float
    high: float
    errors: Mapping[str, float]


@dataclass(frozen=True)
class Layer:
    """One quantized layer of the manifest.

    Attributes:
        block: index of its transformer block; None for a layer outside the blocks.
        kind: its name within the block, with expert numbers as ``*``; the layers of one kind
            share a plot.
        shape: (out, in).
        weight: the weight's format in words.
        bits: stored bits per weight, scales included.
        weight_error: ‖W − Ŵ‖ / ‖W‖.
        output_error: the same of the layer's outputs on calibration data, if there was any.
        input_range: of a static activation scale, or None.
    """

    name: str
    block: int | None
    kind: str
    shape: tuple[int, ...]
    scheme: str
    weight: str
    solver: str
    bits: float
    weight_error: float | None
    output_error: float | None
    input_range: InputRange | None = None


@dataclass(frozen=True)
class SourceUse:
    """What calibration took from one file or data set."""

    name: str | None
    sha256: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class Calibration:
    """The token batches that calibration ran on."""

    hash: str
    samples: int
    seq_len: int
    seed: int
    sources: tuple[SourceUse, ...]


@dataclass(frozen=True)
class Run:
    """Everything a run left. ``verdict`` and both results are None when it was not gated.

    ``caches`` are the ranges of quantized keys and values by the name of their scale.
    """

    model: str
    output: str
    date: str
    recipe: str | None
    recipe_name: str | None
    recipe_text: str | None
    size_bytes: int
    source_bytes: int
    bits_per_weight: float
    layers: tuple[Layer, ...]
    kept: tuple[str, ...]
    calibration: Calibration | None
    seconds: Mapping[str, float]
    peak_rss_bytes: int | None
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    hashes: Mapping[str, str]
    files: Mapping[str, str]
    warnings: tuple[str, ...]
    verdict: Verdict | None = None
    candidate: Results | None = None
    baseline: Results | None = None
    flips: tuple[Flip, ...] = ()
    caches: tuple[tuple[str, InputRange], ...] = ()


def find_run(path: str | Path) -> Path:
    """The folder with ``run.json``: ``path`` itself, or the ``.run`` beside a checkpoint.

    Raises:
        UsageError: there is none.
    """
    path = Path(path)
    # `.` and `..` have no name of their own to put a suffix on.
    named = path if path.name not in ("", "..") else path.resolve()
    names = [named.name, *(named.name.removesuffix(s) for s in _SIBLINGS)]
    for folder in [path, *(named.with_name(f"{name}.run") for name in names if name)]:
        if (folder / "run.json").is_file():
            return folder
    raise UsageError(
        f"{path}: holds no run.json, and there is none in {named.name}.run beside it",
        remedy="give the OUT.run folder that `quantkit calibrate -o OUT` wrote",
    )


def read_run(path: str | Path) -> Run:
    """Read the folder of a run.

    Args:
        path: ``OUT.run``, or ``OUT`` or ``OUT.rejected`` when ``OUT.run`` lies beside it.

    Raises:
        UsageError: no run there, or a file is malformed or belongs to another run.
        QuantkitError: results whose rows do not match their manifest.
    """
    folder = find_run(path)
    file = folder / "run.json"
    document = read_json(file)
    try:
        facts = _facts(document)
        gated = document["verdict"] is not None
        fingerprints = (
            [document[side]["fingerprint"] for side in ("results", "baseline")] if gated else []
        )
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as e:
        raise UsageError(
            f"{file}: not the document of a run ({e!r})",
            remedy="make it again with `quantkit calibrate`",
        ) from e
    if not gated:
        # Scores that lie in the folder are then left from an earlier run.
        return Run(**facts)
    candidate, baseline = (
        _results(folder / name, fingerprint)
        for name, fingerprint in zip(("results.json", "baseline.json"), fingerprints, strict=True)
    )
    return Run(
        **facts,
        verdict=_verdict(folder / "gate.json"),
        candidate=candidate,
        baseline=baseline,
        flips=_flips(folder / "flips.jsonl"),
    )


def _facts(document: Any) -> dict[str, Any]:
    """The fields of `Run` that ``run.json`` holds."""
    manifest, machine = document["manifest"], dict(document.get("machine") or {})
    recipe = manifest.get("recipe") or {}
    results = document.get("results") or {}
    print_ = results.get("fingerprint") or {}
    versions = {"quantkit": manifest.get("quantkit"), **(manifest.get("versions") or {})}
    versions |= {"lm_eval": print_.get("lm_eval"), "python": machine.pop("python", None)}
    peak = document.get("peak_rss_bytes")
    return {
        "model": str(document["model"]),
        "output": str(document["output"]),
        "date": str(document["date"]),
        "recipe": document.get("recipe"),
        "recipe_name": recipe.get("name"),
        "recipe_text": recipe.get("text"),
        "size_bytes": _count(manifest["size_bytes"]),
        "source_bytes": _count(manifest["source_bytes"]),
        "bits_per_weight": _number(manifest["bits_per_weight"]),
        "layers": _layers(manifest["layers"]),
        "caches": _caches(manifest.get("kv_cache")),
        "kept": tuple(str(name) for name in manifest.get("kept", ())),
        "calibration": _calibration(manifest.get("data")),
        "seconds": {str(k): _number(v) for k, v in document.get("seconds", {}).items()},
        "peak_rss_bytes": None if peak is None else _count(peak),
        "machine": _texts({**machine, **(print_.get("host") or {})}),
        "versions": _texts(versions),
        "hashes": _hashes(manifest, results, print_),
        "files": _texts(manifest.get("files") or {}),
        "warnings": tuple(str(w) for w in document.get("warnings", ())),
    }


def _layers(table: Mapping[str, Any]) -> tuple[Layer, ...]:
    """The manifest's layers, ordered by block (JSON sorts block 10 before block 2)."""
    layers = []
    for name, facts in table.items():
        block, kind = split_name(name)
        layers.append(
            Layer(
                name=name,
                block=block,
                kind=kind,
                shape=tuple(_count(n) for n in facts["shape"]),
                scheme=str(facts["scheme"]),
                weight=str(facts["weight"]),
                solver=str(facts["solver"]),
                bits=_number(facts["bits"]),
                weight_error=_optional(facts.get("weight_error")),
                output_error=_optional(facts.get("output_error")),
                input_range=_input_range(facts.get("input_range")),
            )
        )
    outside = max((x.block for x in layers if x.block is not None), default=0) + 1
    return tuple(
        sorted(layers, key=lambda x: (outside if x.block is None else x.block, kind_key(x.kind)))
    )


def _caches(facts: Mapping[str, Any] | None) -> tuple[tuple[str, InputRange], ...]:
    """In the model's order (JSON sorts block 10 before block 2)."""
    found = []
    for name, sides in (facts or {"ranges": {}})["ranges"].items():
        for scale, side in (("k_scale", "keys"), ("v_scale", "values")):
            chosen = _input_range(sides[side])
            assert chosen is not None
            found.append((f"{name}.{scale}", chosen))
    return tuple(sorted(found, key=lambda x: (split_name(x[0])[0] or 0, x[0])))


def _input_range(facts: Mapping[str, Any] | None) -> InputRange | None:
    if facts is None:
        return None
    errors = {str(label): _number(error) for label, error in facts["errors"].items()}
    return InputRange(str(facts["observer"]), _number(facts["low"]), _number(facts["high"]), errors)


def split_name(name: str) -> tuple[int | None, str]:
    """``model.layers.3.mlp.experts.7.up_proj`` → (3, ``mlp.experts.*.up_proj``).

    Parents that say nothing (``self_attn``, a plain ``mlp``) are left out of the kind.
    """
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None or at == len(parts) - 1:
        return None, name
    inside = ["*" if part.isdecimal() else part for part in parts[at + 1 :]]
    kind = ".".join(inside) if "*" in inside else inside[-1]
    return int(parts[at]), kind


#: Kinds in the order in which a block runs them; others follow by name.
_KINDS = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
)


def kind_key(kind: str) -> tuple[int, str]:
    """Sorts kinds of layers."""
    leaf = kind.rpartition(".")[2]
    return (_KINDS.index(leaf) if leaf in _KINDS else len(_KINDS), kind)


def _calibration(data: Mapping[str, Any] | None) -> Calibration | None:
    if data is None:
        return None
    sources = tuple(
        SourceUse(
            name=s.get("name"),
            sha256=str(s["sha256"]),
            documents=_count(s["documents"]),
            tokens=_count(s["tokens"]),
        )
        for s in data["sources"]
    )
    counts = {key: _count(data[key]) for key in ("samples", "seq_len", "seed")}
    return Calibration(hash=str(data["hash"]), sources=sources, **counts)


def _hashes(
    manifest: Mapping[str, Any], results: Mapping[str, Any], fingerprint: Mapping[str, Any]
) -> dict[str, str]:
    """What names the inputs and the artifact, in the order in which they come together."""
    found: dict[str, Any] = {
        "original weights": (manifest.get("source") or {}).get("hash"),
        "recipe": (manifest.get("recipe") or {}).get("sha256"),
        "plan": manifest.get("plan"),
        "calibration data": (manifest.get("data") or {}).get("hash"),
        "checkpoint": fingerprint.get("model"),
        "tokenizer": fingerprint.get("tokenizer"),
        "chat template": fingerprint.get("chat_template"),
        "held-out text": (results.get("text") or {}).get("hash"),
    }
    for name, task in (results.get("tasks") or {}).items():
        found[f"task {name}"] = task.get("hash")
    return _texts(found)


def _results(path: Path, fingerprint: Any) -> Results:
    results = Results.load(path)
    if results.fingerprint != fingerprint:
        raise UsageError(
            f"{path}: belongs to another run than the run.json beside it",
            remedy="make the run again with `quantkit calibrate`",
        )
    positions = results.text.kl_by_position if results.text else ()
    if not all(isinstance(kl, float | int) and math.isfinite(kl) for kl in positions):
        raise UsageError(f"{path}: kl_by_position holds what is not a finite number")
    return results


def _verdict(path: Path) -> Verdict:
    document = read_json(path)
    try:
        checks = tuple(
            GateCheck(
                name=str(c["name"]),
                outcome=Outcome(c["outcome"]),
                value=_number(c["value"]),
                lower=_optional(c["lower"]),
                upper=_optional(c["upper"]),
                limit=_number(c["limit"]),
                reason=str(c["reason"]),
                details=dict(c.get("details") or {}),
            )
            for c in document["checks"]
        )
        warnings = tuple(str(w) for w in document.get("warnings", ()))
        return Verdict(Outcome(document["outcome"]), checks, warnings)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as e:
        raise UsageError(f"{path}: not a verdict ({e!r})", remedy="make the run again") from e


_FLIP_TEXTS = (
    *("task", "id", "direction", "prompt", "target"),
    *("baseline_prediction", "candidate_prediction"),
)


def _flips(path: Path) -> tuple[Flip, ...]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path}: cannot be read ({e})") from e
    flips = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            doc = json.loads(line)
            flips.append(
                Flip(
                    **{key: str(doc[key]) for key in _FLIP_TEXTS},
                    slice=None if doc["slice"] is None else str(doc["slice"]),
                    baseline_score=_number(doc["baseline_score"]),
                    candidate_score=_number(doc["candidate_score"]),
                    must_not_flip=bool(doc["must_not_flip"]),
                )
            )
        except (KeyError, TypeError, ValueError) as e:
            raise UsageError(f"{path}:{number}: not a flipped item ({e!r})") from e
    return tuple(flips)


def _number(value: Any) -> float:
    """A finite number; a plot has no place for another."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


def _optional(value: Any) -> float | None:
    return None if value is None else _number(value)


def _count(value: Any) -> int:
    return int(_number(value))


def _texts(table: Mapping[str, Any]) -> dict[str, str]:
    """Without what is absent."""
    return {str(key): str(value) for key, value in table.items() if value not in (None, "")}
