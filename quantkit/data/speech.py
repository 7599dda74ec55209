"""Spoken text → audio features and the tokens of its transcript.

A source is a JSONL file, one clip a line::

    {"audio": "clips/0001.wav", "text": "My parcel has not arrived."}

``audio`` is a 16-bit PCM wave file, one channel, at the model's sampling rate; its path is
relative to the JSONL file.
"""

from __future__ import annotations

import hashlib
import json
import random
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from quantkit.data.sources import Source
from quantkit.data.tokens import SourceReport, TokenBatches
from quantkit.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Stands in `TokenBatches.ids` behind a transcript that is shorter than the longest.
NO_TOKEN = -1


@dataclass(frozen=True)
class Clip:
    """One line of a source: mono samples in [-1, 1) and what is said."""

    samples: npt.NDArray[np.float32]
    text: str
    source: int


def load_speech(
    sources: Sequence[Source],
    extractor: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    start: int,
    longest: int,
    samples: int,
    seed: int = 0,
) -> tuple[TokenBatches, list[torch.Tensor]]:
    """Read, shuffle and transcribe clips.

    Args:
        sources: JSONL files; their weights are not used.
        extractor: the model's feature extractor.
        tokenizer: of the transcripts.
        start: the token that the decoder starts with.
        longest: tokens of a transcript at most; the rest is cut off.
        samples: clips wanted.
        seed: of the shuffle.

    Returns:
        decoder inputs int64 ``[clips, T]``, `NO_TOKEN` behind the shorter ones, and fp32 features
        ``[1, bins, frames]`` of each clip.

    Raises:
        UsageError: a malformed line or file, with its place.
    """
    clips = [c for i, s in enumerate(sources) for c in _clips(s, i, extractor.sampling_rate)]
    if not clips:
        raise UsageError("calibration data: no clip in any source", remedy="give --data FILE.jsonl")
    random.Random(seed).shuffle(clips)
    clips = clips[:samples]
    digest = hashlib.sha256(b"speech")
    features, rows = [], []
    for clip in clips:
        made = extractor(clip.samples, sampling_rate=extractor.sampling_rate, return_tensors="np")
        features.append(torch.from_numpy(np.asarray(made["input_features"], dtype=np.float32)))
        ids = list(tokenizer(clip.text).input_ids)
        ids = (ids if ids[:1] == [start] else [start, *ids])[:longest]
        rows.append(ids)
        digest.update(clip.samples.tobytes() + json.dumps(ids).encode())
    width = max(len(ids) for ids in rows)
    table = torch.tensor([ids + [NO_TOKEN] * (width - len(ids)) for ids in rows])
    report = tuple(_report(s, i, clips, rows) for i, s in enumerate(sources))
    short = samples - len(clips)
    warnings = (f"the sources hold {len(clips)} of {samples} clips",) if short else ()
    return TokenBatches(table, digest.hexdigest(), report, short, warnings), features


def _clips(source: Source, number: int, rate: int) -> Iterator[Clip]:
    path = Path(source.path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path}: cannot be read ({e})") from e
    for line, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        where = f"{path}:{line}"
        try:
            row = json.loads(text)
        except json.JSONDecodeError as e:
            raise UsageError(f"{where} not JSON ({e.msg})") from e
        if not isinstance(row, dict) or not all(
            isinstance(row.get(key), str) for key in ("audio", "text")
        ):
            raise UsageError(
                f"{where} is no clip",
                remedy='a line is {"audio": "path/of.wav", "text": "what is said"}',
            )
        yield Clip(_read_wave(path.parent / row["audio"], rate, where), row["text"], number)


def _read_wave(path: Path, rate: int, where: str) -> npt.NDArray[np.float32]:
    """Samples fp32 in [-1, 1)."""
    try:
        with wave.open(str(path)) as file:
            form = (file.getnchannels(), 8 * file.getsampwidth(), file.getframerate())
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as e:
        raise UsageError(f"{where} {path}: not a wave file that can be read ({e})") from e
    if form != (1, 16, rate):
        raise UsageError(
            f"{where} {path}: {form[0]} channels of {form[1]} bits at {form[2]} Hz, where the "
            f"model hears one of 16 bits at {rate} Hz",
            remedy=f"convert it: ffmpeg -i IN -ac 1 -ar {rate} -c:a pcm_s16le OUT.wav",
        )
    return np.frombuffer(data, dtype="<i2").astype(np.float32) / np.float32(32768)


def _report(
    source: Source, number: int, clips: Sequence[Clip], rows: Sequence[list[int]]
) -> SourceReport:
    mine = [len(ids) for clip, ids in zip(clips, rows, strict=True) if clip.source == number]
    total = sum(map(len, rows))
    return SourceReport(
        path=source.path,
        name=source.name,
        sha256=hashlib.sha256(Path(source.path).read_bytes()).hexdigest(),
        documents=len(mine),
        documents_used=len(mine),
        skipped=0,
        tokens_read=sum(mine),
        tokens_used=sum(mine),
        share=sum(mine) / total,
        wanted_share=sum(mine) / total,
        shortfall=0,
        exhausted=False,
    )
