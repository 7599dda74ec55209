"""What the comparison of engines computes and writes. No other engine needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmark_scripts import load_script

from quantkit import model as models
from quantkit.calibrate import CalibrationData, calibrate
from quantkit.checkpoint.write import write_checkpoint
from quantkit.errors import QuantkitError
from quantkit.plan import make_plan
from quantkit.recipe import Recipe
from quantkit.schemes import SCHEMES

interop = load_script("interop")

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
FACTS = {
    "model": "m",
    "prompts": 2,
    "new_tokens": 3,
    "machine": "x",
    "versions": {"torch": "1"},
}


def answers(shift: float = 0.0, *texts: str) -> object:
    return interop.Answers([-1.0 + shift, -2.0 - shift], list(texts) or ["a", "b"])


def test_rows_hold_agreement_and_distance() -> None:
    oracle = answers(0.1, "a", "b")
    row = interop.compare(lambda: answers(0.5, "a", "c"), answers, lambda: oracle)
    assert (row.loads, row.agreement, row.usual) == (True, 0.5, 1.0)
    assert (row.delta, row.floor) == (pytest.approx(0.5), pytest.approx(0.1))


@pytest.mark.parametrize(
    ("name", "how"),
    [("w4a16-g64", ""), ("w4a16-asym-g64", "CompressedTensorsConfig(dequantize=True)")],
)
def test_a_row_says_what_transformers_was_asked_for(
    name: str, how: str, tiny: Path, tmp_path: Path
) -> None:
    """Its default mode gives packed zero points the wrong shape."""
    folder = tmp_path / name
    recipe = Recipe(SCHEMES[name], keep=("lm_head",))
    loaded = models.load_source(str(tiny))
    plan = make_plan(recipe, loaded.model, samples=2, seq_len=32)
    done = calibrate(loaded, plan, CalibrationData(torch.zeros(2, 32).long(), "x"), tmp_path / "w")
    write_checkpoint(folder, loaded, plan, done.layers, {})
    prompts = ["Where is my parcel?", "Hello there"]
    theirs = interop.ask_transformers(folder, prompts, 4)
    ours = interop.ask_ours(folder, "reference", prompts, 4)
    assert theirs.how == how
    row = interop.compare(lambda: theirs, lambda: ours, lambda: ours)
    assert row.delta < 1e-3
    document = {"rows": {f"{name} transformers": vars(row)}, "facts": FACTS}
    assert f"| yes{f', with `{how}`' if how else ''} |" in interop.table(document)


def test_an_engine_that_cannot_run_activations_is_not_asked_without_them(
    tmp_path: Path,
) -> None:
    with pytest.raises(OSError, match="w8a8"):
        interop.ask_transformers(tmp_path / "w8a8", ["a"], 1)


def test_what_an_engine_raises_is_its_reason() -> None:
    def refuses() -> object:
        raise QuantkitError(
            "the engine ended; its log ends:\n  loading\n  ValueError: no kernel\n  bye"
        )

    assert interop.compare(refuses, answers, answers).reason == "ValueError: no kernel"
    log = [
        "(EngineCore pid=7) ERROR 11-22 [core.py:9] NotImplementedError: no kernel for 3 bits",
        "(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    assert interop.reason_of(QuantkitError("\n".join(log))) == (
        "NotImplementedError: no kernel for 3 bits"
    )
    assert interop.reason_of(QuantkitError(log[1])).startswith("RuntimeError: Engine core")
    listed = [
        "(EngineCore pid=7) ERROR 11-22 [core.py:9] ValueError: No kernel. Reasons:",
        "(EngineCore pid=7) ERROR 11-22 [core.py:9]   Marlin cannot run on CPUs",
    ]
    assert interop.reason_of(QuantkitError("\n".join(listed))) == (
        "ValueError: No kernel. Reasons: Marlin cannot run on CPUs"
    )
    assert interop.reason_of(QuantkitError(listed[0])) == "ValueError: No kernel. Reasons:"
    others = [
        *listed,
        "(EngineCore pid=7) ERROR 11-22 [core.py:9]   CPUWNA16 takes 4 bits",
        "(EngineCore pid=7) ERROR 11-22 [core.py:9] a record of the same place",
        "(APIServer pid=6) RuntimeError: Engine core initialization failed. See above.",
    ]
    assert interop.reason_of(QuantkitError("\n".join(others))) == (
        "ValueError: No kernel. Reasons: Marlin cannot run on CPUs; CPUWNA16 takes 4 bits"
    )
    bare = ["ValueError: No kernel. Reasons: ", "Marlin requires capability 75", " no CPU", "bye"]
    assert interop.reason_of(QuantkitError("\n".join(bare))) == (
        "ValueError: No kernel. Reasons: Marlin requires capability 75; no CPU"
    )
    foreign = [listed[0], "(APIServer pid=6) INFO shutting down"]
    assert interop.reason_of(QuantkitError("\n".join(foreign))) == "ValueError: No kernel. Reasons:"
    assert interop.reason_of(KeyError("x")) == "KeyError: 'x'"
    assert interop.last_line("progress\nerror: group 128 does not divide\n") == (
        "group 128 does not divide"
    )


def test_a_reason_that_lost_its_list_is_measured_again() -> None:
    def row(reason: str, loads: bool = False) -> dict[str, object]:
        return {"loads": loads, "reason": reason}

    facts = {"model": "m", "prompts": 2, "new_tokens": 3, "machine": "x", "versions": {}}
    lost, whole = row("ValueError: No kernel. Reasons:"), row("ValueError: No kernel. Reasons: x")
    assert interop.is_cut(None)
    assert interop.is_cut(lost)
    assert not interop.is_cut(whole)
    assert not interop.is_cut(row("", loads=True))
    assert "measures this row again" in interop.table(
        {"facts": facts, "rows": {"w8a16 vllm": lost}}
    )
    assert "again" not in interop.table({"facts": facts, "rows": {"w8a16 vllm": whole}})


def test_rows_of_two_calls_are_measured_alike() -> None:
    def facts(prompts: int = 50, **versions: str) -> dict[str, object]:
        return {"model": "m", "prompts": prompts, "versions": versions}

    first = facts(torch="2", vllm="0.32.0 (cpu)")
    assert interop.join_facts(None, first) == first
    assert interop.join_facts(first, facts(torch="2")) == first, "vLLM's rows are still there"
    assert interop.join_facts(facts(torch="2"), first) == first
    with pytest.raises(SystemExit, match="prompts 50, now 8; give another --output"):
        interop.join_facts(first, facts(8, torch="2"))
    with pytest.raises(SystemExit, match="torch '2', now '3'"):
        interop.join_facts(first, facts(torch="3"))


def test_the_page_keeps_everything_but_its_table() -> None:
    rows = {
        "w4a16-g64 transformers": {
            "loads": True,
            "agreement": 0.5,
            "usual": 0.8,
            "delta": 0.01,
            "floor": 0.001,
        },
        "w8a16 vllm": {"loads": False, "reason": "a | b" + "x" * 900},
    }
    page = f"above\n{BEGIN}\nold\n{END}\nbelow\n"
    written = interop.replace_table(page, interop.table({"facts": FACTS, "rows": rows}))
    assert written.startswith("above\n")
    assert written.endswith("\nbelow\n")
    assert "old" not in written
    assert "| w4a16-g64 | transformers | yes | 50% (80%) | 0.01000 (0.00100) |" in written
    assert "no: a \\| bx" in written
    assert "Not measured yet: w8a16 (transformers), w8a16-g32 (transformers, vllm)," in written
    with pytest.raises(SystemExit, match="measured: begin"):
        interop.replace_table("nothing", "x")


def test_the_page_in_the_docs_has_its_marks() -> None:
    page = (Path(__file__).parents[2] / "docs" / "interop.md").read_text()
    for mark in ("measured", "padded", "llamacpp"):
        written = f"{interop.BEGIN.format(mark)}\nx\n{interop.END.format(mark)}"
        assert written in interop.replace_table(page, "x", mark)


def test_llamacpp_has_a_table_of_its_own() -> None:
    rows = {"w8a8 llama.cpp": {"loads": False, "reason": "no"}}
    text = interop.table({"facts": FACTS, "rows": rows}, ["w8a8", "w8a16"], ["llama.cpp"])
    assert "| w8a8 | llama.cpp | no: no |" in text
    assert text.endswith("Not measured yet: w8a16 (llama.cpp).")


def test_llamacpp_needs_its_build(monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        "sys.argv", ["interop", "m", "--data", "d", "-o", "no.json", "--engine", "llama.cpp"]
    )
    with pytest.raises(SystemExit) as stopped:
        interop.main()
    assert stopped.value.code == 2
    assert "--llama" in capsys.readouterr().err


def test_a_table_of_some_schemes_misses_no_others() -> None:
    text = interop.table({"facts": FACTS, "rows": {}}, ["w4a16-g128"])
    assert text.endswith("Not measured yet: w4a16-g128 (transformers, vllm).")


def test_only_known_schemes_are_asked_for() -> None:
    assert interop.wanted(["w8a8", "w4a16-g64"]) == ["w8a8", "w4a16-g64"]
    with pytest.raises(SystemExit, match="known here"):
        interop.wanted(["w5"])


def test_prompts_are_product_text() -> None:
    prompts = interop.read_prompts(50)
    assert len(set(prompts)) > 40
    with pytest.raises(SystemExit, match="there are"):
        interop.read_prompts(10**6)
