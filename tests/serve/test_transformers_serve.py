"""`benchmarks/transformers_serve.py`: prompts as text, answers without an end, the real server."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import transformers_serve as peer
from benchmarks import vs_servers as vs
from quantkit.loadtest.ask import Ask
from quantkit.models.runtime import Runtime


class Letters:
    """A token a letter, but for "ab", which is read as one token, 99."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join("ab" if i == 99 else chr(97 + i) for i in ids)

    def encode(self, text: str) -> list[int]:
        return [99 if c == "#" else ord(c) - 97 for c in text.replace("ab", "#")]


def test_a_prompt_survives_if_it_is_read_as_it_was() -> None:
    assert peer.survives(Letters(), [1, 0, 99])
    assert not peer.survives(Letters(), [0, 1])


def test_prompts_that_would_be_read_otherwise_are_skipped(runtime: Runtime, tmp_path: Path) -> None:
    runtime.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("a quick fox")
    prompts = vs.Prompts(tmp_path, tmp_path / "text.txt", as_text=True)
    prompts.tokenizer, prompts.ids, prompts.used = Letters(), [0, 1, 2, 0, 1, 3, 4], 0
    asks = prompts.row("off", 2, 2, 1)
    # [0, 1] is read as [99], and so is the next [0, 1].
    assert [ask.prompt_ids for ask in asks] == [(1, 2), (1, 3)]


def test_it_is_sent_text_and_nothing_that_it_refuses() -> None:
    body = peer.body_of(Letters())(Ask(None, "all", (1, 99), 5), "m")
    assert body["prompt"] == "bab"
    assert body["max_tokens"] == 5
    assert not {"ignore_eos", "min_tokens", "return_token_ids"} & set(body)


def test_a_model_without_an_end(tiny: Path) -> None:
    with peer.endless(tiny) as folder:
        assert json.loads((folder / "config.json").read_text())["eos_token_id"] is None
        weights = folder / "model.safetensors"
        assert weights.resolve() == (tiny / "model.safetensors").resolve()
    assert not folder.exists()
    assert json.loads((tiny / "config.json").read_text())["eos_token_id"] is not None


@pytest.fixture
def spelling(tiny_untied: Path, tmp_path: Path) -> Path:
    """A random model that writes letters: of parts of letters the server shows nothing."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_untied)
    model = AutoModelForCausalLM.from_pretrained(tiny_untied, dtype="auto")
    with torch.no_grad():
        for i, row in enumerate(model.lm_head.weight):
            if not tokenizer.decode([i]).isalpha():
                row.zero_()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
@pytest.mark.parametrize("way", peer.ARGUMENTS)
def test_the_real_server(
    way: str, spelling: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("The quick brown fox sleeps, and the lazy dog jumps over it. " * 20)
    options = [
        *(str(spelling), "--text", str(text), "-o", str(output), "--phase", "off", "--rounds", "1"),
        *("--transformers-python", sys.executable, "--transformers", way, "--threads", "1"),
        *("--prompt-tokens", "8", "--output-tokens", "4", "--concurrency", "1", "2"),
        *("--requests", "1"),
    ]
    monkeypatch.setattr(sys, "argv", ["vs_servers", *options])
    vs.main()
    [found] = json.loads(output.read_text())["phases"]["off"]
    assert (found["name"], found["config"]) == ("transformers", way)
    assert found["version"].startswith("transformers ")
    assert [len(row["rounds"]) for row in found["rows"]] == [1, 1]
