"""What a model is known by: sha256 of its files, tokenizer and chat template."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


#: How an embedding model pools (sentence-transformers): the one file of a model in a folder below.
POOLING = "*_Pooling/config.json"


def hash_file(path: Path) -> str:
    """sha256 of a file's content, hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hash_folder(folder: Path) -> dict[str, str]:
    """sha256 of every file that determines a model: weights, config, tokenizer, pooling.

    Returns:
        by path relative to ``folder``, with ``/``.
    """
    suffixes = (".safetensors", ".json", ".model", ".jinja", ".txt")
    paths = [p for p in folder.iterdir() if p.is_file() and p.suffix in suffixes]
    names = sorted(p.relative_to(folder).as_posix() for p in (*paths, *folder.glob(POOLING)))
    return {name: hash_file(folder / name) for name in names}


def combine_hashes(hashes: dict[str, str]) -> str:
    """One sha256 over names and hashes, in name order."""
    text = "".join(f"{name} {digest}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def weight_hash(files: dict[str, str]) -> str:
    """One sha256 over the weight files and config among the hashes of `hash_folder`.

    Pooling is no part of it: it changes neither weights nor hidden states.
    """
    names = [n for n in files if "/" not in n and n.endswith((".safetensors", "config.json"))]
    return combine_hashes({name: files[name] for name in names})


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over the vocabulary, special tokens and added tokens.

    Independent of how the tokenizer was serialized, so that an export keeps its source's.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    special = repr(sorted((k, str(v)) for k, v in tokenizer.special_tokens_map.items()))
    return hashlib.sha256((text + special).encode()).hexdigest()


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the chat template, or ``none``."""
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(str(template).encode()).hexdigest() if template else "none"
