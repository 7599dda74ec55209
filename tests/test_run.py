"""One whole run on a tiny model: gated, promoted, rejected, inconclusive, reused baselines."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantkit.cli.main import run
from quantkit.errors import UsageError
from quantkit.evals.suites import installed_folder, load_suites
from quantkit.job import Job, prepare
from quantkit.recipe import load_recipe
from tests.run_helpers import arguments, contents, leftovers

WORDS = re.findall(r"\w+", "late parcel refund broken door invoice account thanks please where")


def write_suite(folder: Path, items: int, traffic: Path | None = None) -> Path:
    """A multiple-choice suite whose answers a random model gives by its own preferences."""
    rng = random.Random(1)
    (folder / "rows.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "id": f"i{i}",
                    "message": " ".join(rng.choices(WORDS, k=rng.randint(6, 12))) + f" {i}",
                    "choices": rng.sample(WORDS, 4),
                    "label": rng.randrange(4),
                }
            )
            + "\n"
            for i in range(items)
        )
    )
    path = folder / "tiny_suite.yaml"
    path.write_text(
        "task: tiny_suite\ndataset_path: json\n"
        "dataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{message}} ="\ndoc_to_choice: "{{choices}}"\ndoc_to_target: label\n'
        "metric_list:\n  - metric: acc\nmetadata: {version: 1.0}\n"
    )
    return path


def write_recipe(folder: Path, scheme: str, gates: str) -> Path:
    path = folder / f"{scheme}.yaml"
    path.write_text(
        f"scheme: {scheme}\nkeep: [lm_head]\ncalibrate: {{samples: 4, seq_len: 64}}\ngate:\n{gates}"
    )
    return path


def write_text(folder: Path) -> Path:
    path = folder / "held_out.txt"
    path.write_text(" ".join(random.Random(3).choices(WORDS, k=1200)))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path)


@pytest.fixture(scope="module")
def original(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original's results on the same suite and text, by `quantkit eval`."""
    folder = tmp_path_factory.mktemp("original")
    path = folder / "results.json"
    argv = ["eval", str(tiny), "--suite", str(write_suite(folder, 60))]
    argv += ["--text", str(write_text(folder)), "--max-tokens", "2048", "-o", str(path)]
    assert run(argv) == 0
    return path


def not_reached(*_: object, **__: object) -> None:
    raise AssertionError("work was begun")


def calibrate(
    tmp_path: Path, tiny: Path, traffic: Path, text: Path, recipe: Path, *more: str
) -> tuple[int, Path]:
    out = tmp_path / "out"
    suite = tmp_path / "tiny_suite.yaml"
    if not suite.exists():
        write_suite(tmp_path, 60)
    scored = ["--text", str(text), "--suite", str(suite), "--eval-tokens", "2048"]
    code = run(arguments(tiny, recipe, traffic, out, *scored, *more, gate=True))
    return code, out


def test_pass_promotes(
    tiny: Path, traffic: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    gates = "  kl.mean: {max: 0.5}\n  tiny_suite.acc: {margin: 0.3}\n  size.ratio: {max: 0.7}\n"
    recipe = write_recipe(tmp_path, "w8a16", gates)
    code, out = calibrate(tmp_path, tiny, traffic, text, recipe, "--json")
    assert code == 0
    document = json.loads(capfd.readouterr().out)
    assert document["verdict"] == "PASS"
    assert document["output"] == str(out)
    manifest = json.loads((out / "quantkit.json").read_text())
    assert manifest["verdict"]["outcome"] == "PASS"
    assert manifest["evals"]["candidate"]["kl_mean"] > 0
    assert not {"date", "seconds"} & set(manifest)
    names = {p.name for p in (tmp_path / "out.run").iterdir()}
    assert names == {"run.json", "results.json", "baseline.json", "gate.json", "flips.jsonl"}
    assert not (tmp_path / "out.partial").exists()
    # The same files, judged again from disk, say the same.
    folder = tmp_path / "out.run"
    policy = tmp_path / "policy.yaml"
    policy.write_text(gates.replace("  ", "", 3).replace("\n  ", "\n"))
    argv = ["gate", str(folder / "results.json"), "--baseline", str(folder / "baseline.json")]
    assert run([*argv, "--policy", str(policy)]) == 0


def test_the_manifest_names_its_sources_and_nothing_of_the_machine(
    tiny: Path, traffic: Path, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same model, recipe and data from other folders give the same bytes."""
    exports = []
    for name in ("here", "there"):
        folder = tmp_path / name
        folder.mkdir()
        model = Path(shutil.copytree(tiny, folder / "model"))
        words = folder / "words.txt"
        words.write_text("where is my parcel and when will it come? " * 40)
        out = folder / "out"
        argv = arguments(
            model,
            shutil.copy(recipe, folder),
            shutil.copy(traffic, folder),
            out,
            *("--data", str(words), "--seq-len", "96"),
        )
        assert run(argv) == 0
        exports.append(contents(out))
    assert exports[0] == exports[1]
    text = exports[0]["quantkit.json"].decode()
    assert str(tmp_path) not in text
    data = json.loads(text)["data"]
    names = [source["name"] for source in data["sources"]]
    assert names == ["traffic.jsonl", "words.txt"]
    for source, path in zip(data["sources"], (traffic, words), strict=True):
        assert source["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert source["tokens"] == 192
    assert sum(source["tokens"] for source in data["sources"]) == data["samples"] * data["seq_len"]
    capfd.readouterr()
    assert run(["inspect", str(out)]) == 0
    assert "words.txt: 192 tokens" in capfd.readouterr().out
    page = tmp_path / "report.html"
    assert run(["report", str(out), "-o", str(page)]) == 0
    html = page.read_text()
    assert "words.txt" in html
    assert "source 1" not in html


def test_the_command_line_overrides_the_recipe(
    tiny: Path, traffic: Path, text: Path, tmp_path: Path
) -> None:
    gated = write_recipe(tmp_path, "w8a16", "  kl.mean: {max: 0.5}\n")
    gated.write_text(gated.read_text().replace("seq_len: 64", "seq_len: 64, seed: 5"))
    out = tmp_path / "out"

    def calibration(*more: str) -> tuple[int, int, int]:
        argv = arguments(tiny, gated, traffic, out, "--text", str(text), *more, gate=True)
        assert run(argv) == 0
        data = json.loads((out / "quantkit.json").read_text())["data"]
        return data["samples"], data["seq_len"], data["seed"]

    def held_out() -> tuple[int, int]:
        measured = json.loads((tmp_path / "out.run" / "results.json").read_text())["text"]
        return measured["seq_len"], len(measured["windows"])

    assert calibration() == (4, 64, 5)
    assert held_out()[0] == 1024
    numbers = ("--samples", "3", "--seq-len", "48", "--seed", "0")
    windows = ("--eval-seq-len", "96", "--eval-tokens", "192")
    assert calibration(*numbers, *windows) == (3, 48, 0)
    assert held_out() == (96, 2)


def test_less_held_out_text_than_a_window_is_refused_before_any_work(
    tiny: Path, traffic: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, "w8a16", "  kl.mean: {max: 0.5}\n")
    code, out = calibrate(tmp_path, tiny, traffic, text, recipe, "--eval-tokens", "192")
    assert code == 2
    assert "raise --eval-tokens or lower --eval-seq-len" in capfd.readouterr().err
    assert leftovers(out) == []
    assert not (tmp_path / "out.partial").exists()


def test_a_held_out_text_that_cannot_be_used_is_refused_before_any_work(
    tiny: Path,
    traffic: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("quantkit.job.load_inputs", not_reached)
    recipe = write_recipe(tmp_path, "w8a16", "  kl.mean: {max: 0.5}\n")
    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("too short")
    binary.write_bytes(b"\xff\xfe\x00")
    for text, message in (
        (tmp_path / "missing.txt", "missing.txt: no such file"),
        (tmp_path / "missing.jsonl", "missing.jsonl"),
        (binary, "binary.txt: cannot be read as UTF-8 text"),
        (short, "has 9 tokens, less than one window of 1024; give more text, or lower"),
    ):
        code, out = calibrate(tmp_path, tiny, traffic, text, recipe)
        assert code == 2
        assert message in capfd.readouterr().err
        assert leftovers(out) == []
        assert not (tmp_path / "out.partial").exists()


def test_kernels_and_devices_that_are_not_there_are_refused_before_any_work(
    tiny: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.model.load_source", not_reached)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    job = Job(str(tiny), load_recipe(str(recipe)), tmp_path / "out")
    with pytest.raises(UsageError, match="kernels 'nativ': one of native, native-float"):
        prepare(replace(job, kernels="nativ"))
    with pytest.raises(UsageError, match="torch sees no CUDA device; use --device cpu"):
        prepare(replace(job, device="cuda"))


def test_a_gate_on_text_needs_some_that_was_not_calibrated_on(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Without --text, held-out text is the traffic of suites that the recipe leaves alone."""
    monkeypatch.setattr("quantkit.model.load_source", not_reached)
    recipe = write_recipe(tmp_path, "w8a16", "  kl.mean: {max: 0.5}\n")
    out = tmp_path / "out"
    folder = installed_folder()
    assert folder is not None
    suites = [s for s in load_suites([folder]) if s.traffic is not None]
    data = [word for s in suites for word in ("--data", f"evals:{s.name}")]
    assert run(["calibrate", str(tiny), "-r", str(recipe), *data, "-o", str(out)]) == 2
    assert "no held-out text for kl.mean" in capfd.readouterr().err
    assert leftovers(out) == []


def test_fail_rejects_and_a_baseline_is_reused(
    tiny: Path, traffic: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, "w3a16-channel", "  kl.mean: {max: 0.00001}\n")
    code, out = calibrate(tmp_path, tiny, traffic, text, recipe)
    assert code == 1
    assert not out.exists()
    rejected = tmp_path / "out.rejected"
    assert json.loads((rejected / "quantkit.json").read_text())["verdict"]["outcome"] == "FAIL"
    assert run(["verify", str(rejected)]) == 0
    capfd.readouterr()
    baseline = tmp_path / "out.run" / "baseline.json"
    code, _ = calibrate(
        tmp_path, tiny, traffic, text, recipe, "--baseline", str(baseline), "--json"
    )
    assert code == 1
    document = json.loads(capfd.readouterr().out)
    assert document["seconds"]["eval"] > 0


def other_fingerprint(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda results: results["fingerprint"].update({key: "0" * 64})


def without_last_item(results: dict[str, Any]) -> None:
    task = results["tasks"]["tiny_suite"]
    task["rows"].pop()
    task["n"] -= 1


def without_last_window(results: dict[str, Any]) -> None:
    results["text"]["tokens"] -= results["text"]["windows"].pop()[0]


@pytest.mark.parametrize(
    ("change", "argv", "message"),
    [
        (other_fingerprint("model"), (), "model differs: this run has"),
        (other_fingerprint("tokenizer"), (), "tokenizer differs"),
        (other_fingerprint("chat_template"), (), "chat_template differs"),
        (other_fingerprint("lm_eval"), (), "lm_eval differs"),
        (other_fingerprint("seed"), (), "seed differs: this run has 0, the baseline 000000000000"),
        (lambda r: r["tasks"].clear(), (), "has no suite tiny_suite"),
        (lambda r: r["tasks"]["tiny_suite"].update(hash="0" * 64), (), "suite tiny_suite differs"),
        (without_last_item, (), "items of tiny_suite differ: 59 of 60 were scored ('i59' is"),
        (lambda r: r["text"].update(hash="0" * 64), (), "held-out text differs"),
        (without_last_window, (), "number of windows of held-out text differs: this run has 2"),
        (lambda r: r.pop("text"), (), "has no held-out text for perplexity.ratio"),
        (lambda r: None, ("--eval-seq-len", "512"), "seq_len of the held-out text differs"),
    ],
)  # fmt: skip
def test_a_baseline_of_something_else_is_refused_before_any_work(
    change: Callable[[dict[str, Any]], None],
    argv: tuple[str, ...],
    message: str,
    original: Path,
    tiny: Path,
    traffic: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    gates = "  perplexity.ratio: {max: 9}\n  tiny_suite.acc: {margin: 0.3}\n"
    recipe = write_recipe(tmp_path, "w8a16", gates)
    results = json.loads(original.read_text())
    change(results)
    changed = tmp_path / "baseline.json"
    changed.write_text(json.dumps(results))
    monkeypatch.setattr("quantkit.job.load_inputs", not_reached)
    code, out = calibrate(tmp_path, tiny, traffic, text, recipe, "--baseline", str(changed), *argv)
    assert code == 5
    err = capfd.readouterr().err
    assert f"{changed}: {message}" in err
    assert "score the original on the same files" in err
    assert leftovers(out) == []
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("kind", ["conversations", "texts", "plain.txt", "plain"])
def test_eval_and_calibrate_read_held_out_text_alike(
    kind: str,
    tiny: Path,
    traffic: Path,
    tmp_path: Path,
) -> None:
    """So that `quantkit eval` of the original is a baseline."""
    rng = random.Random(4)
    words = [" ".join(rng.choices(WORDS, k=200)) for _ in range(8)]
    if kind == "conversations":
        rows = [{"messages": [{"role": "user", "content": w}]} for w in words]
        held_out = tmp_path / "held_out.jsonl"
        held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "texts":
        held_out = tmp_path / "held_out.jsonl"
        held_out.write_text("".join(json.dumps({"text": w}) + "\n" for w in words))
    else:
        held_out = tmp_path / kind
        held_out.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n \r\n".join(words).encode())
    recipe = write_recipe(tmp_path, "w8a16", "  perplexity.ratio: {max: 9}\n")
    results = tmp_path / "original.json"
    windows = ("--text", str(held_out))
    assert run(["eval", str(tiny), *windows, "--max-tokens", "2048", "-o", str(results)]) == 0
    windows += ("--eval-tokens", "2048", "--baseline", str(results))
    out = tmp_path / "out"
    assert run(arguments(tiny, recipe, traffic, out, *windows, gate=True)) == 0
    scored = [results, tmp_path / "out.run" / "results.json"]
    hashes = [json.loads(path.read_text())["text"]["hash"] for path in scored]
    assert hashes[0] == hashes[1]


def test_too_few_items_are_inconclusive(
    tiny: Path, traffic: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, "w8a16", "  tiny_suite.acc: {margin: 0.02}\n")
    code, out = calibrate(tmp_path, tiny, traffic, text, recipe)
    assert code == 3
    assert not out.exists()
    assert (tmp_path / "out.rejected").exists()
    assert "INCONCLUSIVE" in capfd.readouterr().out


def test_calibrating_on_eval_items_is_refused(
    tiny: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    suite = write_suite(tmp_path, 60)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    leaked = tmp_path / "leaked.jsonl"
    leaked.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": r["message"]}]}) + "\n"
            for r in rows
        )
    )
    recipe = write_recipe(tmp_path, "w8a16", "  tiny_suite.acc: {margin: 0.3}\n")
    code, out = calibrate(tmp_path, tiny, leaked, text, recipe, "--suite", str(suite))
    assert code == 4
    assert "items of tiny_suite are in the calibration data" in capfd.readouterr().err
    assert not out.exists()


def test_a_gate_without_its_suite_is_refused_before_any_work(
    tiny: Path, traffic: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, "w8a16", "  other_suite.acc: {margin: 0.3}\n")
    code, _ = calibrate(tmp_path, tiny, traffic, text, recipe)
    assert code == 2
    assert "no suite of that name is scored" in capfd.readouterr().err
