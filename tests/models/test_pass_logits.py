"""Logits of a pass are cut as they would be by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit.models.pass_logits import PassLogits


@given(st.lists(st.integers(0, 4), max_size=6), st.data())
def test_each_work_has_its_rows(counts: list[int], data: st.DataObject) -> None:
    block = torch.arange(3.0 * sum(counts)).reshape(sum(counts), 3)
    logits, cut = PassLogits(block, counts), block.split(counts)
    assert len(logits) == len(counts)
    for mine, theirs in zip(logits, cut, strict=True):
        assert torch.equal(mine, theirs)
    if counts:
        assert torch.equal(logits[-1], cut[-1])
        assert [len(rows) for rows in logits[1:]] == counts[1:]
    asked = [data.draw(st.integers(0, count)) for count in counts]
    wanted = [rows[len(rows) - n :] for rows, n in zip(cut, asked, strict=True)]
    assert torch.equal(block[logits.last_rows(asked)], torch.cat([block[:0], *wanted]))


def test_there_is_none_behind_the_last() -> None:
    with pytest.raises(IndexError):
        PassLogits(torch.zeros(2, 3), [2])[1]
