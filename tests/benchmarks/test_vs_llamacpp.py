"""What the comparison with llama.cpp computes: sizes, distances, order, ratios. No peer needed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import vs_llamacpp as vs
from benchmarks.logit_distance import Distance, compare
from benchmarks.systems import (
    Size,
    System,
    count_parameters,
    folder_size,
    gguf_size,
    gguf_types,
    list_systems,
)
from benchmarks.workloads import WORKLOADS, check


def row(engine: str, name: str, stored: int = 100, **speeds: list[float]) -> object:
    return vs.Row(System(engine, name, Path(name), Size(stored, stored)), speeds=speeds)


def test_a_token_reads_the_embedding_only_where_it_is_the_head(tmp_path: Path) -> None:
    tied, untied = tmp_path / "tied", tmp_path / "untied"
    tensors = {
        "model.embed_tokens.weight": torch.zeros(10, 4, dtype=torch.bfloat16),
        "model.norm.weight": torch.zeros(4, dtype=torch.bfloat16),
    }
    head = {"lm_head.weight_packed": torch.zeros(10, 1, dtype=torch.int32)}
    for folder, content in ((tied, tensors), (untied, tensors | head)):
        folder.mkdir()
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    assert folder_size(tied) == Size(stored=88, read=88)
    assert folder_size(untied) == Size(stored=128, read=48)
    assert count_parameters(tied) == 44
    with pytest.raises(SystemExit, match="no safetensors"):
        folder_size(tmp_path)


@pytest.mark.parametrize("untied", [False, True])
def test_gguf_sizes_are_of_tensors(tmp_path: Path, untied: bool) -> None:
    import gguf

    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    names = ["token_embd.weight", "blk.0.ffn_up.weight"] + ["output.weight"] * untied
    for name in [*names, "output_norm.weight"]:
        writer.add_tensor(name, np.zeros((2, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert gguf_size(path) == (Size(512, 384) if untied else Size(384, 384))


def test_gguf_types_are_of_matrices(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    types = gguf.GGMLQuantizationType
    writer.add_tensor("output_norm.weight", np.zeros(999, np.float32))
    for name, rows, kind in (("a", 2, types.Q8_0), ("b", 9, types.Q4_0), ("c", 4, types.Q8_0)):
        data = gguf.quants.quantize(np.zeros((rows, 32), np.float32), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert gguf_types(path) == "Q4_0, Q8_0"


def test_distance_by_hand() -> None:
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    q = torch.tensor([[0.5, 0.5], [0.1, 0.9]])
    kl = 0.9 * math.log(9) - 0.1 * math.log(9)
    found = compare([p.log(), p.log()], [q.log() + 3.0, p.log()])  # a shift is no distance
    assert found.kl == pytest.approx(kl / 4, rel=1e-6)
    assert found.kl_p99 == pytest.approx(0.97 * kl, rel=1e-6)  # between the 3rd and 4th of 4
    assert found.top1 == 0.75
    assert found.kl_error == pytest.approx(kl / 4, rel=1e-6)  # windows at kl / 2 and 0
    assert compare([p.log()], [p.log()]).kl_error is None


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(2, 3), r"logits \[2, 3\] beside the original's \[2, 2\]"),
        (torch.tensor([[0.0, math.nan], [0.0, 0.0]]), "NaN"),
    ],
)
def test_logits_that_cannot_be_compared(logits: torch.Tensor, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        compare([torch.zeros(2, 2)], [logits])


def test_a_round_runs_peers_side_by_side_and_every_other_one_backwards() -> None:
    rows = [row("llama.cpp", n) for n in ("bf16", "Q4_0", "Q8_0")]
    rows += [row("quantkit", n) for n in ("bf16", "w4", "alone")]
    pairs = [("w4", "Q4_0"), ("w4", "Q8_0"), ("bf16", "bf16")]
    order = vs.in_turn(rows, pairs, 0)
    names = [(r.system.engine[0], r.system.name) for work, r in order if work.name == "tg128"]
    assert names == [
        ("l", "bf16"), ("q", "bf16"), ("l", "Q4_0"), ("q", "w4"), ("l", "Q8_0"), ("q", "alone"),
    ]  # fmt: skip
    assert vs.in_turn(rows, pairs, 1) == order[::-1]
    assert vs.in_turn(rows, pairs, 2) == order
    assert len(order) == len(rows) * len(WORKLOADS)


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    # The machine halves its speed in the second round: the ratio of medians would be 1.5.
    ours = row("quantkit", "w4", tg128=[200.0, 100.0, 300.0])
    theirs = row("llama.cpp", "Q4_0", tg128=[100.0, 50.0, 200.0])
    assert vs.ratio(ours, theirs, "tg128") == 2.0
    assert math.isnan(vs.ratio(ours, theirs, "pp512"))


def test_the_table_has_a_ratio_below_each_pair() -> None:
    ours = row("quantkit", "w4", stored=50, tg128=[200.0], pp512=[30.0], x16=[9.0])
    theirs = row("llama.cpp", "Q4_0", stored=100, tg128=[100.0], pp512=[60.0], x16=[9.0])
    ours.distance = Distance(0.1, 0.01, 1.0, 0.8)
    theirs.distance = Distance(0.2, None, 2.0, 0.7)
    lines = vs.table([theirs, ours], [("w4", "Q4_0")], parameters=100, bandwidth=20_000.0)
    cells = [line.split() for line in lines]
    assert cells[0] == [
        "system", "bits", "MB/token", "KL", "KL", "p99", "top-1", "tg128", "roof", "pp512", "x16",
    ]  # fmt: skip
    assert cells[1] == [
        "llama.cpp", "Q4_0", "8.00", "0.0", "0.2000", "2.000", "70.0%", "100.0", "50%", "60.0",
        "9.0",
    ]  # fmt: skip
    assert cells[2][2:] == [
        "4.00",
        "0.0",
        "0.1000",
        "1.000",
        "80.0%",
        "200.0",
        "50%",
        "30.0",
        "9.0",
    ]
    assert cells[3] == ["over", "Q4_0", "0.50x", "0.50x", "0.50x", "2.00x", "0.50x", "1.00x"]
    # Each ratio stands in the column of its figure.
    assert lines[3].index("2.00x") == lines[2].index("200.0")
    assert "nan" not in "".join(vs.table([row("quantkit", "w4")], [], 100, 1.0))


def test_counts_other_than_asked_for_stop_the_run() -> None:
    system = System("quantkit", "w4", Path("x"), Size(1, 1))
    check({"batch": 16}, {"batch": 16, "decode_tok_s": 3.0}, system)
    with pytest.raises(SystemExit, match=r"quantkit w4: asked for .*16.*, measured .*8"):
        check({"batch": 16}, {"batch": 8}, system)
    with pytest.raises(SystemExit, match="None"):
        check({"batch": 16}, {}, system)


def test_pairs_name_what_was_given(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(4)}, tmp_path / "model.safetensors")
    words = [str(tmp_path), "--llama", "b", "--ckpt", f"w4={tmp_path}", "--pair", "w4=Q4_0"]
    with pytest.raises(SystemExit, match="--pair w4=Q4_0"):
        list_systems(vs.parse(words))
    with pytest.raises(SystemExit, match="one name"):
        list_systems(vs.parse([*words[:3], "--ckpt", f"bf16={tmp_path}"]))
    with pytest.raises(SystemExit):
        vs.parse([*words, "--gguf", "nothing"])


def test_results_are_json(tmp_path: Path) -> None:
    args = vs.parse([str(tmp_path), "--llama", "b", "-o", str(tmp_path / "r.json")])
    args.pair = [("w4", "Q4_0")]
    ours = row("quantkit", "w4", tg128=[200.0])
    ours.distance = Distance(0.1, None, 1.0, 0.8)
    rows = [row("llama.cpp", "Q4_0", tg128=[100.0]), ours]
    vs.save(args, rows, 100, 1e9, {"build": {}})
    document = json.loads(args.output.read_text(), parse_constant=pytest.fail)
    assert document["rows"][1]["tokens_s"] == {"tg128": 200.0}
    assert document["ratios"] == [{"quantkit": "w4", "llama.cpp": "Q4_0", "tg128": 2.0}]
