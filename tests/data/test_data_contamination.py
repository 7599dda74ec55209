"""Eval items in calibration texts are found, alike ones and others are not."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.data import Overlap, overlap
from quantkit.data.contamination import words
from quantkit.errors import UsageError

ITEM = (
    "The committee met on Tuesday to discuss the new budget, and after a long debate it "
    "agreed to raise the fee for parking near the old harbour by ten percent."
)


def test_exact_match_ignores_case_punctuation_and_spacing() -> None:
    assert overlap(["other", "  the COMMITTEE\nmet."], ["The committee met!"]) == [
        Overlap(eval_index=0, calibration_index=1, kind="exact", share=1.0)
    ]


def test_a_turn_of_a_conversation_is_found() -> None:
    chat = "hello there\nWhat is my account balance?\nYou have 5 dollars."
    assert overlap([chat], ["what is my account balance"]) == [Overlap(0, 0, "line", 1.0)]
    assert overlap(["yes\nno"], ["Yes."]) == [], "short lines are alike by chance"


def test_near_duplicates_by_share_of_ngrams() -> None:
    edited = "Preface. " + ITEM.replace("ten percent", "five percent") + " More text follows."
    (hit,) = overlap(["unrelated words", edited], ["something else", ITEM])
    assert (hit.eval_index, hit.calibration_index, hit.kind) == (1, 1, "ngram")
    assert 0.5 < hit.share < 1
    assert overlap([edited], [ITEM], share=hit.share) == [Overlap(0, 0, "ngram", hit.share)]
    assert overlap([edited], [ITEM], share=min(1.0, hit.share + 0.01)) == []


def test_items_below_n_words_use_shorter_ngrams() -> None:
    item = "how do i change the address on my bank account"
    assert len(words(item)) == 10
    (hit,) = overlap([f"the caller asked {item} please and then left again quickly"], [item])
    assert (hit.kind, hit.share) == ("ngram", 1.0)


def test_best_text_wins_and_the_first_of_equals() -> None:
    half = " ".join(ITEM.split()[:22])
    texts = [f"prefix {half} suffix", f"prefix {ITEM} suffix", f"again {ITEM} suffix", ITEM]
    (hit,) = overlap(texts[:3], [ITEM])
    assert (hit.calibration_index, hit.kind, hit.share) == (1, "ngram", 1.0)
    (hit,) = overlap(texts, [ITEM])
    assert (hit.calibration_index, hit.kind) == (3, "exact")


def test_scripts_without_spaces() -> None:
    item = "请问我的账户余额是多少可以告诉我吗谢谢"
    assert len(words(item)) == len(item)
    assert overlap([f"客服：{item}。好的。"], [item])[0].share == 1.0


def test_duplicate_and_empty_items() -> None:
    assert [hit.eval_index for hit in overlap([ITEM], [ITEM, "", "?!", ITEM])] == [0, 3]
    assert overlap([], [ITEM]) == []
    assert overlap([ITEM, ""], []) == []


@pytest.mark.parametrize("options", [{"n": 0}, {"share": 0.0}, {"share": 1.5}])
def test_arguments_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="contamination"):
        overlap([], [], **options)  # type: ignore[arg-type]


WORDS = st.lists(st.sampled_from("abcd"), max_size=14).map(" ".join)


@given(st.lists(WORDS, max_size=5), st.lists(WORDS, max_size=5), st.integers(1, 8))
def test_agrees_with_sets_of_tuples(calibration: list[str], items: list[str], n: int) -> None:
    """The slow form: Python sets of n-grams."""

    def grams(text: str) -> set[tuple[str, ...]]:
        split = text.split()
        return {tuple(split[k : k + n]) for k in range(len(split) - n + 1)}

    expected = {}
    for i, item in enumerate(items):
        own = grams(item)
        best = max(
            [(len(own & grams(text)) / len(own), -j) for j, text in enumerate(calibration) if own],
            default=(0.0, 0),
        )
        exact = [j for j, text in enumerate(calibration) if item and text == item]
        if exact:
            expected[i] = (exact[0], 1.0)
        elif best[0] >= 0.5:
            expected[i] = (-best[1], best[0])
    found = {hit.eval_index: hit for hit in overlap(calibration, items, n)}
    assert {i: (hit.calibration_index, hit.share) for i, hit in found.items()} == expected


def test_ten_thousand_documents_take_seconds() -> None:
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(5000)]
    texts = [" ".join(rng.choices(vocabulary, k=60)) for _ in range(10_000)]
    items = [" ".join(rng.choices(vocabulary, k=40)) for _ in range(1000)]
    items[500] = texts[9000][:200]
    start = time.process_time()
    found = overlap(texts, items)
    assert [(hit.eval_index, hit.calibration_index) for hit in found] == [(500, 9000)]
    assert time.process_time() - start < 20
