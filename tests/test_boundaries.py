"""Imports go downwards only, and importing the command line costs next to nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "quantkit"

#: Layers from the bottom up; a module imports its own layer and those below.
LAYERS = (
    {"errors", "strict_yaml", "progress", "memory", "noise", "timings"},
    {"schemes", "recipe", "results", "sensitivity", "allocate", "sbom"},
    {"numerics", "packing", "hadamard", "ops"},
    {"observers", "algorithms", "layers"},
    {
        *("input_range", "kv_cache", "steps"),
        *("data", "model", "folding", "plan", "paused", "quantize", "reference", "collector"),
        *("rescale", "rotation", "work", "calibrate", "blocks", "fisher", "distill", "documents"),
        *("batches", "inputs", "routing", "support", "limits", "reconstruct", "footprint", "peak"),
        *("spill", "rounding", "integrity", "machine", "signature"),
        "parallel",
        *("gradients", "importance", "curvature", "ablation", "mixture", "measurement"),
        "checkpoint",
    },
    {"models"},
    {"evals", "serve", "gate", "report", "engines", "loadtest"},
    {
        *("baseline", "blame", "job", "reload", "scoring", "outcomes", "provenance"),
        *("run", "rebuild"),
    },
    {"cli", "__main__"},
)
LEVEL = {name: i for i, layer in enumerate(LAYERS) for name in layer}

#: Tighter than the layers: what may be imported at all.
ONLY = {
    "gate": {"errors", "results", "noise", "timings", "gate"},
    "report": {"errors", "results", "report"},
    "ops": {"errors", "ops"},
    "data": {"errors", "data"},
    "observers": {"errors", "schemes", "numerics", "ops", "observers"},
}
NEVER = {
    "serve": {
        *("calibrate", "quantize", "collector", "work", "plan", "paused", "recipe"),
        *("evals", "gate"),
    },
    "algorithms": {"model", "models", "layers"},
    "evals": {"serve", "gate", "engines"},
    "engines": {"evals", "serve", "gate", "calibrate", "quantize", "plan"},
    "loadtest": {"serve", "gate", "calibrate", "quantize", "plan"},
}


def modules() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p.parent != PACKAGE or p.stem != "__init__"]


def owner(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Top-level parts of quantkit that a file imports at run time."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{a.name}" for a in node.names}
    parts = {n.split(".")[1] for n in names if n.startswith("quantkit.") and n.count(".")}
    return parts & set(LEVEL)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards(path: Path) -> None:
    me = owner(path)
    assert me in LEVEL, f"{me} has no layer: add it to LAYERS"
    for other in imported(path):
        assert LEVEL[other] <= LEVEL[me], f"{me} imports {other}, which lies above it"
        assert other in ONLY.get(me, LEVEL), f"{me} may import only {ONLY.get(me)}, not {other}"
        assert other not in NEVER.get(me, ()), f"{me} must not import {other}"


@pytest.mark.parametrize(
    "name",
    [
        *("quantkit.gate", "quantkit.results", "quantkit.report"),
        *("quantkit.serve.policy.tiered", "quantkit.serve.policy.admission"),
        *("quantkit.serve.config", "quantkit.serve.capture", "quantkit.loadtest.session"),
    ],
)
def test_what_needs_no_torch(name: str) -> None:
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = "torch transformers numpy scipy lm_eval fastapi"
    code = (
        f"import sys, quantkit.cli.main; print([m for m in {heavy.split()!r} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"


def test_no_environment_variables_in_the_library() -> None:
    for path in modules():
        if owner(path) != "cli":
            assert "os.environ" not in path.read_text(), path
            assert "getenv" not in path.read_text(), path


FACTORIES = {"empty", "zeros", "ones", "full", "rand", "randn", "eye", "linspace"}


def test_no_tensor_takes_the_default_dtype() -> None:
    """It is the program's and transformers changes it while it loads, and native code is handed
    addresses alone."""
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and node.func.attr in FACTORIES:
                assert any(k.arg == "dtype" for k in node.keywords), f"{path}:{node.lineno}"
