"""Pages: whose they are, and that cutting a sequence short leaves no trace."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from quantkit.errors import QuantkitError
from quantkit.models.decoder import Decoder
from quantkit.models.llama_family import build_decoder
from quantkit.models.page_pool import PagedSequence, PagePool, pages_for
from quantkit.models.paged import PagedRunner, Work

SICK = 7  # a token whose embedding is no number


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[SICK] = float("nan")
    return build_decoder(model)


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(8, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8", "fp8"])
@pytest.mark.parametrize(("keep", "cut"), [(1, 3), (61, 2), (63, 1), (64, 5), (65, 70), (100, 80)])
def test_truncated_tokens_leave_no_trace(decoder: Decoder, kv: str, keep: int, cut: int) -> None:
    """Read, cut and read other tokens: the bits of a sequence that never saw the cut ones.

    The cut tokens cross pages, and one of them leaves NaNs in its key.
    """
    ids, wrong = tokens(keep + 90), [*tokens(cut - 1, seed=1), SICK]
    runner = PagedRunner(decoder.with_kv_dtype(kv), 4)
    plain = PagedSequence()
    runner.logits([Work(plain, ids[:keep])])
    wanted = [runner.logits([Work(plain, [token])])[0] for token in ids[keep : keep + 3]]
    wanted += runner.logits([Work(plain, ids[keep + 3 :], all_logits=True)])
    runner.release(plain)

    sequence = PagedSequence()
    runner.logits([Work(sequence, ids[:keep])])
    for _ in range(2):
        rows = runner.logits([Work(sequence, wrong, all_logits=True)])[0]
        assert not torch.isfinite(rows[-1]).any()
        runner.truncate(sequence, keep)
        assert (sequence.length, len(sequence.pages)) == (keep, pages_for(keep))
    got = [runner.logits([Work(sequence, [token])])[0] for token in ids[keep : keep + 3]]
    got += runner.logits([Work(sequence, ids[keep + 3 :], all_logits=True)])
    for mine, theirs in zip(got, wanted, strict=True):
        assert torch.equal(mine, theirs)
    runner.release(sequence)
    assert runner.free_pages == 4


def test_what_others_read_is_not_cut(decoder: Decoder) -> None:
    runner = PagedRunner(decoder, 3)
    first = PagedSequence()
    runner.logits([Work(first, tokens(130))])
    second = runner.fork(first) if runner.free_pages else None
    assert second is None  # three pages are in use: a fork needs one more for the partial page
    runner.truncate(first, 128)
    second = runner.fork(first)
    with pytest.raises(QuantkitError, match="shared and cannot be cut to 100"):
        runner.truncate(second, 100)
    with pytest.raises(QuantkitError, match="128 tokens cannot be cut to 129"):
        runner.truncate(second, 129)
    runner.truncate(second, 64)
    assert second.pages == first.pages[:1]
    runner.release(first)
    runner.release(second)
    assert runner.free_pages == 3


def test_kept_pages_go_last_and_the_least_recently_used_of_them_first() -> None:
    pool, forgotten = PagePool(4), []
    pool.on_forget = forgotten.append
    pages = [pool.take() for _ in range(4)]
    for page in pages[:3]:
        pool.remember(page)
    for page in (pages[2], pages[3], pages[0], pages[1]):
        pool.give_back(page)
    pool.share(pages[2])  # used again, and so the most recent
    pool.give_back(pages[2])
    assert [pool.take() for _ in range(4)] == [pages[3], pages[0], pages[1], pages[2]]
    assert forgotten == [pages[0], pages[1], pages[2]]
    with pytest.raises(QuantkitError, match="no free page"):
        pool.take()


@settings(deadline=None)
@given(
    actions=st.lists(
        st.tuples(
            st.sampled_from(["extend", "truncate", "release"]), st.integers(0, 3), st.floats(0, 1)
        ),
        max_size=60,
    )
)
def test_no_page_is_lost_or_owned_twice(actions: list[tuple[str, int, float]]) -> None:
    pool = PagePool(8)
    sequences = [PagedSequence() for _ in range(4)]
    for action, index, share in actions:
        sequence = sequences[index]
        if action == "extend":
            length = sequence.length + int(share * 200)
            if pool.extend(sequence, length):
                sequence.length = length
        elif action == "truncate":
            pool.truncate(sequence, int(share * sequence.length))
        else:
            pool.release(sequence)
        owned = [page for item in sequences for page in item.pages]
        assert len(owned) == len(set(owned)) == pool.used
        assert all(len(item.pages) == pages_for(item.length) for item in sequences)
