"""Calibration data: sources → documents → token windows with a content hash.

Read in this order: `sources` (where text comes from), `rows` (shapes of a row), `render` (chat
templates, token ids), `packing` (windows and shares), `tokens` (all of it in one call), and
`contamination` (calibration against eval items).
"""

from __future__ import annotations

from quantkit.data.contamination import Overlap, overlap
from quantkit.data.packing import pack
from quantkit.data.render import encode, render
from quantkit.data.rows import Document
from quantkit.data.sources import (
    Corpus,
    Source,
    document_hashes,
    iter_documents,
    iter_texts,
)
from quantkit.data.tokens import SourceReport, TokenBatches, content_hash, load_tokens

__all__ = [
    "Corpus",
    "Document",
    "Overlap",
    "Source",
    "SourceReport",
    "TokenBatches",
    "content_hash",
    "document_hashes",
    "encode",
    "iter_documents",
    "iter_texts",
    "load_tokens",
    "overlap",
    "pack",
    "render",
]
