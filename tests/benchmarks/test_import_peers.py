"""What the benchmark of other programs' checkpoints computes. No peer needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from benchmark_scripts import load_script
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.config import build_config
from quantkit.checkpoint.tensors import to_disk
from quantkit.models.load import load_runtime
from quantkit.numerics import quantize_weight
from quantkit.schemes import SCHEMES
from tests.checkpoint.conftest import merging_tokenizer, small_llama

peers = load_script("import_peers")

SCHEME = SCHEMES["w8a8"]
IDS = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(0))


def test_the_error_is_that_of_the_logits(tiny: Path) -> None:
    theirs = load_runtime(tiny, kernels="reference", dtype=torch.float32).logits(IDS[0].tolist())
    ours = peers.logits(tiny, "reference", IDS)
    assert peers.error(ours, theirs) == 0
    assert abs(peers.error(ours * 1.1, theirs) - 0.1) < 1e-6


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small w8a8 checkpoint, written as llm-compressor does."""
    folder = tmp_path_factory.mktemp("w8a8")
    model = small_llama(torch.bfloat16)
    model.save_pretrained(folder)
    merging_tokenizer().save_pretrained(folder)
    layers = {n for n, m in model.named_modules() if n.endswith("_proj")}
    tensors = load_file(folder / "model.safetensors")
    for name in layers:
        q = quantize_weight(tensors.pop(f"{name}.weight"), SCHEME.weight)
        tensors |= {f"{name}.{key}": value for key, value in to_disk(q, SCHEME, None).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = build_config(
        dict.fromkeys(layers, SCHEME), [*layers, "lm_head"]
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_errors_of_a_checkpoint(stored: Path) -> None:
    """Transformers' own layers are the oracle, weights and inputs of theirs."""
    ids = IDS % 250
    model = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32).eval()
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(
                lambda _, given, made, name=name: layers.update({name: (given[0], made)})
            )
    with torch.no_grad():
        logits = model(ids[:1]).logits[0]
    weights = {name: weight.clone() for name, weight in peers.weights(stored).items()}
    kept = {"logits": logits, "weights": weights}
    found = peers.compare(stored, ids, kept, {"logits": logits, "layers": layers})
    assert found["weights"] == 0
    assert found["layers"] < 1e-6
    found |= {"flips": peers.flips(stored, ids, 2**-24), "flips16": peers.flips(stored, ids, 2**-9)}
    assert 0 < found["flips16"] < 0.1
    assert peers.is_right(found)
    weights["model.layers.0.mlp.up_proj"] *= 1.05
    layers["model.layers.0.mlp.up_proj"][1].mul_(1.001)
    found |= peers.compare(stored, ids, kept, {"logits": logits, "layers": layers})
    assert abs(found["weights"] - 0.05 / 1.05) < 1e-3
    assert abs(found["layers"] - 1e-3) < 1e-4
    assert not peers.is_right(found)
    broken = {"logits": torch.full_like(logits, torch.nan), "layers": layers}
    assert set(peers.compare(stored, ids, kept, broken)) == {"weights", "memory", "layers"}


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("weights", 0.011, False),
        ("layers", 2e-4, False),
        ("native", 0.029, True),
        ("native", 0.031, False),
        ("memory", 0.03, True),
        ("memory", 0.031, False),
    ],
)
def test_an_error_of_logits_may_be_what_flips_make(name: str, value: float, right: bool) -> None:
    found = {"weights": 0.0, "layers": 0.0, "flips": 0.01, "flips16": 0.02}
    assert peers.is_right(found | {name: value}) is right
    assert not peers.is_right({"native": 0.011})


def test_rows_of_two_calls_have_the_same_versions(tmp_path: Path) -> None:
    path, facts = tmp_path / "rows.json", {"peers": {"torch": "1"}, "quantkit": {"torch": "2"}}
    assert peers.known_rows(path, facts) == {}
    [first, second, *_] = peers.CASES
    rows = {second: peers.Row(ok=True, weights=0.001, said="a | b"), first: peers.Row(ok=False)}
    peers.save(path, facts, rows)
    assert peers.known_rows(path, facts) == rows
    with pytest.raises(SystemExit, match="give another --output"):
        peers.known_rows(path, {**facts, "peers": {}})
    measured = peers.table(facts, rows)
    assert measured.index(f"| {first} |") < measured.index(f"| {second} | 1e-03 |")
    assert "a \\| b" in measured
    assert "**fails**" in measured
    assert measured.splitlines()[-1].startswith("Not measured: ")
    page = f"x\n{peers.BEGIN}\nold\n{peers.END}\ny\n"
    assert peers.replace_table(page, "new") == f"x\n{peers.BEGIN}\nnew\n{peers.END}\ny\n"
    with pytest.raises(SystemExit, match="imports: begin"):
        peers.replace_table("nothing", "x")


def test_the_page_holds_what_the_rows_say() -> None:
    root = Path(__file__).parents[2]
    document = json.loads((root / "benchmarks" / "results" / "import_peers.json").read_text())
    rows = {name: peers.Row(**row) for name, row in document["rows"].items()}
    page = (root / "docs" / "formats.md").read_text()
    assert page == peers.replace_table(page, peers.table(document["facts"], rows))


def test_a_script_that_fails_gives_its_last_line(tmp_path: Path) -> None:
    assert peers.ask(sys.executable, "import sys; print(sys.argv[1])", tmp_path) == ""
    assert peers.ask(sys.executable, "raise SystemExit('no such format')") == "no such format"


def test_what_transformers_makes_up_is_not_compared(tmp_path: Path) -> None:
    """A head that a config calls quantized and no file holds: its scales are left as memory was."""
    model = small_llama(torch.bfloat16)
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    tensors = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for name in linears - {"lm_head"}:
        q = quantize_weight(tensors.pop(f"{name}.weight"), SCHEME.weight)
        tensors |= {f"{name}.{key}": value for key, value in to_disk(q, SCHEME, None).items()}
    model.config.quantization_config = build_config(dict.fromkeys(linears, SCHEME), sorted(linears))
    model.config.save_pretrained(tmp_path)
    ids = IDS % 250
    torch.save(ids, tmp_path / "ids.pt")

    def loaded() -> tuple[str, Path]:
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        kept = tmp_path / "kept.pt"
        return peers.ask(sys.executable, peers._LOAD, tmp_path, tmp_path / "ids.pt", kept), kept

    said, kept = loaded()
    assert said == ""
    theirs = torch.load(kept)
    assert theirs["missing"] == ["lm_head.weight_scale"]
    merging_tokenizer().save_pretrained(tmp_path)
    assert peers.error(peers.logits(tmp_path, "native", ids), theirs["logits"]) < 0.1
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    said, _ = loaded()
    assert said.startswith("made up: lm_head.weight_scale, model.layers.0.mlp.up_proj.weight_scale")


def test_scripts_are_python_and_a_folder_below_is_found(tmp_path: Path) -> None:
    for name, case in peers.CASES.items():
        compile(case.script, name, "exec")
    below = tmp_path / "model-w4g64"
    below.mkdir()
    (below / "config.json").write_text("{}")
    assert peers.written(tmp_path) == below
    (tmp_path / "config.json").write_text("{}")
    assert peers.written(tmp_path) == tmp_path


def test_what_is_not_made_is_a_failure(tmp_path: Path) -> None:
    row = peers.measure(peers.Case("raise SystemExit('boom')"), tmp_path, sys.executable, IDS)
    assert not row.ok
    assert row.said == "not made: boom"
    assert peers.line("x", row).startswith("FAIL x")
