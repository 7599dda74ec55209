"""Clips: what a source may hold, and what is refused, with its place."""

from __future__ import annotations

import wave
from pathlib import Path

import pytest
import torch
from transformers import WhisperFeatureExtractor

from quantkit.data.sources import Source
from quantkit.data.speech import NO_TOKEN, load_speech
from quantkit.data.tokens import TokenBatches
from quantkit.errors import UsageError
from tests.architectures import spoken
from tests.conftest import byte_tokenizer


def load(path: Path, samples: int = 4, seed: int = 0) -> tuple[TokenBatches, list[torch.Tensor]]:
    return load_speech(
        [Source(str(path))],
        WhisperFeatureExtractor(feature_size=80, chunk_length=1),
        byte_tokenizer(),
        start=257,
        longest=16,
        samples=samples,
        seed=seed,
    )


def test_clips_become_features_and_decoder_inputs(tmp_path: Path) -> None:
    tokens, features = load(spoken(tmp_path))
    assert tokens.ids.shape[0] == len(features) == 4
    assert all(heard.shape == (1, 80, 100) for heard in features)
    assert (tokens.ids[:, 0] == 257).all()
    lengths = (tokens.ids != NO_TOKEN).sum(1)
    assert int(lengths.max()) == 16  # the longer transcripts are cut
    assert tokens.report[0].tokens_used == int(lengths.sum())


def test_clips_are_known_by_their_content(tmp_path: Path) -> None:
    path = spoken(tmp_path)
    assert load(path)[0].hash == load(path)[0].hash
    assert load(path)[0].hash != load(path, seed=1)[0].hash
    few, _ = load(path, samples=9)
    assert few.shortfall == 3
    assert few.warnings == ("the sources hold 6 of 9 clips",)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", r"clips\.jsonl:1 not JSON"),
        ('{"audio": "0.wav"}', r"clips\.jsonl:1 is no clip"),
        ('{"audio": "none.wav", "text": "x"}', r"clips\.jsonl:1 .*none\.wav: not a wave file"),
        ('{"audio": "clips.jsonl", "text": "x"}', "not a wave file that can be read"),
        ('{"audio": "slow.wav", "text": "x"}', "1 channels of 16 bits at 8000 Hz"),
    ],
)
def test_what_is_no_clip_is_named(line: str, reason: str, tmp_path: Path) -> None:
    path = spoken(tmp_path, clips=1)
    path.write_text(line + "\n")
    with wave.open(str(tmp_path / "slow.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(b"\0\0" * 100)
    with pytest.raises(UsageError, match=reason):
        load(path)


def test_a_source_without_clips_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    with pytest.raises(UsageError, match="no clip in any source"):
        load(path)
