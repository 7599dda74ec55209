"""`load_tokens`: deterministic windows, honest reports, order and names of no account."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from quantkit.data import Source, TokenBatches, load_tokens, tokens
from quantkit.errors import UsageError

Write = Callable[..., str]


def rows(letter: str, count: int = 300) -> list[dict[str, str]]:
    rng = random.Random(letter)
    return [{"text": letter * rng.randint(1, 200) + f" {i}"} for i in range(count)]


def load(
    tokenizer: PreTrainedTokenizerBase,
    *sources: Source,
    samples: int = 16,
    seq_len: int = 128,
    seed: int = 0,
) -> TokenBatches:
    return load_tokens(sources, tokenizer, samples=samples, seq_len=seq_len, seed=seed)


def test_windows_are_full_and_reported(tokenizer: PreTrainedTokenizerBase, jsonl: Write) -> None:
    path = jsonl([*rows("a"), {"text": ""}])
    batches = load(tokenizer, Source(path))
    assert batches.ids.shape == (16, 128)
    assert batches.ids.dtype == torch.int64
    (report,) = batches.report
    assert (report.path, report.documents, report.skipped) == (path, 300, 1)
    assert report.name == Path(path).name
    assert (report.tokens_used, report.share, report.shortfall) == (16 * 128, 1.0, 0)
    assert 0 < report.documents_used < 300
    assert report.tokens_read < 16 * 128 + 210
    (warning,) = batches.warnings
    assert warning.endswith("1 of 301 rows hold no words and were left out")


def test_every_token_of_every_document_is_there(
    tokenizer: PreTrainedTokenizerBase, jsonl: Write
) -> None:
    texts = [row["text"] for row in rows("a", 50)]
    path = jsonl([{"text": text} for text in texts])
    batches = load(tokenizer, Source(path), samples=10**6, seq_len=1)
    documents = str(tokenizer.decode(batches.ids.ravel())).split("</s>")
    assert sorted(documents) == sorted(["", *("<s>" + text for text in texts)])
    assert documents[:-1] != ["<s>" + text for text in texts], "documents are shuffled"


def test_same_inputs_same_bytes_and_no_global_random_state(
    tokenizer: PreTrainedTokenizerBase, jsonl: Write
) -> None:
    source = Source(jsonl(rows("a")))
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    first = load(tokenizer, source)
    assert random.getstate() == before[0]
    assert str(np.random.get_state()) == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    again = load(tokenizer, source)
    assert torch.equal(first.ids, again.ids)
    assert first == again
    assert load(tokenizer, source, seed=1).hash != first.hash


def test_result_is_pinned(tokenizer: PreTrainedTokenizerBase, jsonl: Write) -> None:
    # A changed hash means that recorded checkpoints cannot be reproduced: change it knowingly.
    batches = load(tokenizer, Source(jsonl(rows("a"))), samples=2, seq_len=8)
    assert batches.hash == tokens.content_hash(batches.ids.numpy())
    assert batches.hash == "178741185aac2f8434b07900dad52caf4f8e5c85c77592e205db7716293f6655"


def test_order_and_names_of_sources_do_not_matter(
    tokenizer: PreTrainedTokenizerBase, jsonl: Write
) -> None:
    a, b = Source(jsonl(rows("a"), "a.jsonl"), weight=2), Source(jsonl(rows("b"), "b.jsonl"))
    renamed = Source(jsonl(rows("a"), "zz.jsonl"), weight=2)
    one, other, third = load(tokenizer, a, b), load(tokenizer, b, a), load(tokenizer, b, renamed)
    assert one.hash == other.hash == third.hash
    assert one.report == other.report[::-1]
    assert load(tokenizer, a, Source(b.path, weight=2)).hash != one.hash


def test_hash_covers_the_shape(tokenizer: PreTrainedTokenizerBase, jsonl: Write) -> None:
    source = Source(jsonl(rows("a")))
    wide = load(tokenizer, source, samples=1, seq_len=64)
    tall = load(tokenizer, source, samples=2, seq_len=32)
    assert torch.equal(wide.ids.ravel(), tall.ids.ravel())
    assert wide.hash != tall.hash


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (3.0, 1.0, 0.5), (0.1, 0.2, 0.7)])
def test_shares_follow_weights(
    tokenizer: PreTrainedTokenizerBase, jsonl: Write, weights: tuple[float, ...]
) -> None:
    sources = [
        Source(jsonl(rows(letter), f"{letter}.jsonl"), weight=weight)
        for letter, weight in zip("abc", weights, strict=True)
    ]
    batches = load(tokenizer, *sources, samples=64)
    text = tokenizer.decode(batches.ids.ravel())
    letters = [text.count(letter) for letter in "abc"]
    for report, weight, count in zip(batches.report, weights, letters, strict=True):
        assert report.share == pytest.approx(weight / sum(weights), abs=0.001)
        assert count / sum(letters) == pytest.approx(weight / sum(weights), abs=0.02)


def test_a_source_that_runs_out_is_reported_and_not_repeated(
    tokenizer: PreTrainedTokenizerBase, jsonl: Write
) -> None:
    small = Source(jsonl([{"text": "z" * 100}], "small.jsonl"))
    batches = load(tokenizer, small, Source(jsonl(rows("a"))))
    assert batches.shortfall == 0
    assert batches.report[0].exhausted
    assert batches.report[0].tokens_used == batches.report[0].tokens_read == 102
    assert batches.report[0].shortfall == 1024 - 102
    assert tokenizer.decode(batches.ids.ravel()).count("z") == 100
    (warning,) = batches.warnings
    assert "small.jsonl: ran out after 102 tokens; its share is 5.0% instead of 50.0%" in warning


def test_too_few_tokens_give_fewer_windows_and_a_warning(
    tokenizer: PreTrainedTokenizerBase, jsonl: Write
) -> None:
    batches = load(tokenizer, Source(jsonl([{"text": "a" * 299}])))
    assert batches.ids.shape == (2, 128)
    assert batches.shortfall == 14
    assert batches.warnings == (
        "the sources fill 2 of 16 windows of 128 tokens; add data, or lower calibrate.samples",
    )


def test_less_than_one_window_is_an_error(tokenizer: PreTrainedTokenizerBase, jsonl: Write) -> None:
    source = Source(jsonl([{"text": "a" * 10}, {"text": "b"}]))
    with pytest.raises(UsageError, match="15 tokens in 2 documents do not fill one window of 128"):
        load(tokenizer, source)


def test_arguments_are_checked(tokenizer: PreTrainedTokenizerBase, jsonl: Write) -> None:
    source = Source(jsonl(rows("a", 2)))
    with pytest.raises(UsageError, match=r"no calibration data; give `calibrate.data`"):
        load(tokenizer)
    with pytest.raises(UsageError, match=r"calibrate.samples 0 is below 1"):
        load(tokenizer, source, samples=0)
    with pytest.raises(UsageError, match=r"calibrate.seq_len -1 is below 1"):
        load(tokenizer, source, seq_len=-1)
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="has no end-of-text token"):
        load(tokenizer, source)


def test_several_passes_give_what_one_pass_gives(
    tokenizer: PreTrainedTokenizerBase, jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(jsonl(rows("a")))
    expected = load(tokenizer, source, samples=100)
    monkeypatch.setattr(tokens, "BYTES_PER_TOKEN", 0.1)
    assert load(tokenizer, source, samples=100).hash == expected.hash


def test_the_file_is_streamed(
    tokenizer: PreTrainedTokenizerBase, jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    picked: list[int] = []
    original = tokens.Corpus.pick

    def pick(self: tokens.Corpus, indices: list[int]) -> list[object]:
        picked.append(len(indices))
        return list(original(self, indices))

    monkeypatch.setattr(tokens.Corpus, "pick", pick)
    load(tokenizer, Source(jsonl(rows("a", 2000))), samples=2, seq_len=16)
    assert sum(picked) < 10


@pytest.mark.real_model
def test_real_tokenizer(smollm: PreTrainedTokenizerBase, jsonl: Write, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Where is my order?"}]
    chat = Source(
        jsonl(
            [
                {"messages": [*turns, {"role": "assistant", "content": f"At {i}."}]}
                for i in range(100)
            ]
        ),
        weight=3,
    )
    book = tmp_path / "book.txt"
    book.write_text("It was the best of times, it was the worst of times.\n\n" * 200)
    batches = load(smollm, chat, Source(str(book)), samples=8, seq_len=256)
    assert [report.share for report in batches.report] == [0.75, 0.25]
    text = smollm.decode(batches.ids.ravel())
    assert "<|im_start|>user\nWhere is my order?<|im_end|>\n<|im_start|>assistant\nAt " in text
    assert "it was the worst of times" in text
