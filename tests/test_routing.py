"""Tokens by expert, on a model's names alone."""

from __future__ import annotations

import pytest
from torch import nn

from quantkit.errors import QuantkitError
from quantkit.routing import ExpertTokens


def test_a_block_none_of_whose_experts_saw_a_token() -> None:
    tokens = ExpertTokens(nn.Module(), least=1)
    tokens.counts = {"0.experts": [0, 0], "1.experts": [0, 0]}
    with pytest.raises(QuantkitError, match=r"0\.experts\.0: 0 calibration tokens") as caught:
        tokens.check(["0.experts.0.up_proj", "0.experts.1.up_proj"])
    assert "\n  0.experts  0 0\n" in str(caught.value)
    tokens.add("0.experts.0.up_proj", 5)
    tokens.add("0.experts.1.up_proj", 3)
    tokens.check(["0.experts.0.up_proj", "0.experts.1.up_proj"])
