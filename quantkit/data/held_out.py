"""Held-out text: what perplexity and divergence are measured on, as one string.

Every command reads a file the same way, so that two results on it can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.data.render import render
from quantkit.data.rows import Document
from quantkit.data.sources import HUB, Source, iter_documents
from quantkit.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Suffixes of files that are read whole: blank lines in them are text, not ends of documents.
PLAIN = (".txt", ".md", "")


def read_held_out(path: Path) -> list[Document]:
    """A plain text file as one document; else the rows that a `Source` of this path gives.

    Raises:
        UsageError: no such file, not UTF-8, or a malformed row.
    """
    where = str(path)
    if path.suffix not in PLAIN or path.is_dir() or where.startswith(HUB):
        return list(iter_documents(Source(where)))
    try:
        return [Document(where, text=path.read_text(encoding="utf-8-sig"))]
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path}: cannot be read as UTF-8 text ({e})") from e


def join_held_out(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> str:
    """One text of many documents, conversations as the model would see them.

    Args:
        documents: joined by line feeds, in this order.
        tokenizer: its chat template renders conversations; without one they become plain
            ``role: content`` lines.

    Raises:
        UsageError: see `quantkit.data.render.render`.
    """
    template = tokenizer.chat_template is not None
    return "\n".join(render(d, tokenizer, chat_template=template) for d in documents)
