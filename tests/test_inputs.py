"""What a family of models reads: positions of encoders, extractors of recognizers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from quantkit import model as models
from quantkit.data import Source
from quantkit.errors import UsageError
from quantkit.inputs import _speech, load_inputs
from quantkit.recipe import Calibration
from tests.architectures import TEXT
from tests.conftest import byte_tokenizer


@pytest.mark.parametrize(("name", "most"), [("Bert", 64), ("Roberta", 62), ("MPNet", 62)])
def test_positions_of_an_encoder(name: str, most: int, traffic: Path) -> None:
    """RoBERTa and its like begin to count behind the padding token's position, here 1."""
    make = getattr(transformers, f"{name}Model")
    options = {**TEXT, "max_position_embeddings": 64, "num_hidden_layers": 1, "pad_token_id": 1}
    model = make(make.config_class(**options)).eval()
    model.config.architectures = [make.__name__]
    source = models.SourceModel(model, byte_tokenizer(), "encoder", traffic.parent, {})

    def windows(seq_len: int) -> torch.Tensor:
        calibration = Calibration(samples=2, seq_len=seq_len)
        return load_inputs([Source(str(traffic))], source, calibration)[0].ids

    ids = windows(most)
    assert ids.shape == (2, most)
    with torch.no_grad():
        assert model(ids).last_hidden_state.isfinite().all()
    with pytest.raises(UsageError, match=f"{most + 1} is more than the {most} positions"):
        windows(most + 1)


def test_an_extractor_that_fails_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr(transformers.AutoFeatureExtractor, "from_pretrained", fail)
    source = SimpleNamespace(folder=tmp_path, source="model")
    with pytest.raises(UsageError, match=r"model: has no feature extractor \(OSError\)"):
        _speech([], source, Calibration())
