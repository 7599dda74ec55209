"""A tokenizer in GGUF's metadata, as llama.cpp reads it.

llama.cpp splits text by rules that it knows by name (``tokenizer.ggml.pre``). The name is chosen by
the tokenizer's own rules, so that both split alike; a tokenizer whose rules are not in the table is
refused, because a wrong name gives other tokens without an error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.fields import read_object
from quantkit.errors import UsageError
from quantkit.model.quiet import first_line

if TYPE_CHECKING:
    import gguf

_GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: A tokenizer's rules, see `_rules` → (llama.cpp's name for them, whether a word that is a token is
#: taken before any merge). Source: llama.cpp, ``src/llama-vocab.cpp`` (llm_tokenizer_bpe).
PRE_TOKENIZERS: dict[tuple[tuple[Any, ...], ...], tuple[str, bool]] = {
    (("ByteLevel", True),): ("gpt-2", False),
    (("Digits", True), ("ByteLevel", True)): ("smollm", False),
    (("Split", _GPT4_WORDS % "{1,3}"), ("ByteLevel", False)): ("llama-bpe", True),
    (("Split", _GPT4_WORDS % ""), ("ByteLevel", False)): ("qwen2", False),
}


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocabulary: int) -> None:
    """Write tokens, merges, special tokens and the chat template.

    Args:
        writer: of the file.
        folder: with ``tokenizer.json`` and ``tokenizer_config.json``.
        vocabulary: rows of the embedding; ids without a token become unused ones.

    Raises:
        UsageError: a damaged tokenizer, or one that llama.cpp has no rules for.
    """
    import gguf
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UsageError(f"{folder}: has no tokenizer.json, which a GGUF file is written from")
    tokenizer = read_object(path)
    try:
        Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises nothing narrower
        raise UsageError(f"{path}: no tokenizer ({first_line(e)})") from e
    for extra in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        if extra.is_file():
            read_object(extra)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name_rules(tokenizer, path))
    tokens, kinds = _tokens(tokenizer, vocabulary, path)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocabulary)
    special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)


def name_rules(tokenizer: dict[str, Any], path: Path) -> str:
    """llama.cpp's name for the rules of a ``tokenizer.json``.

    Raises:
        UsageError: it has none that `PRE_TOKENIZERS` knows.
    """
    model = tokenizer["model"]
    rules = _rules(tokenizer.get("pre_tokenizer"))
    if model.get("type") != "BPE" or rules not in PRE_TOKENIZERS:
        known = ", ".join(name for name, _ in PRE_TOKENIZERS.values())
        raise UsageError(
            f"{path}: a {model.get('type')} tokenizer that splits by {_short(rules)} is not one "
            "that quantkit can name for llama.cpp",
            remedy=f"known are byte-level BPE with the rules of {known}; take the vocabulary from "
            "llama.cpp's own convert_hf_to_gguf.py --vocab-only",
        )
    name, whole_words = PRE_TOKENIZERS[rules]
    if bool(model.get("ignore_merges")) != whole_words:
        raise UsageError(
            f"{path}: ignore_merges is {bool(model.get('ignore_merges'))}, and llama.cpp's rules "
            f"{name} take it as {whole_words}"
        )
    normalizer = (tokenizer.get("normalizer") or {"type": "NFC"})["type"]
    if normalizer != "NFC":
        raise UsageError(f"{path}: normalizes by {normalizer}, which llama.cpp does not do")
    return name


def _rules(pre_tokenizer: dict[str, Any] | None) -> tuple[tuple[Any, ...], ...]:
    """The steps of a pre-tokenizer, each with what changes where it splits."""
    if pre_tokenizer is None:
        return ()
    if pre_tokenizer["type"] == "Sequence":
        return tuple(r for part in pre_tokenizer["pretokenizers"] for r in _rules(part))
    kind = pre_tokenizer["type"]
    if kind == "ByteLevel" and not pre_tokenizer.get("add_prefix_space"):
        return ((kind, bool(pre_tokenizer.get("use_regex", True))),)
    if kind == "Digits":
        return ((kind, bool(pre_tokenizer.get("individual_digits"))),)
    isolated = pre_tokenizer.get("behavior") == "Isolated" and not pre_tokenizer.get("invert")
    if kind == "Split" and isolated and "Regex" in pre_tokenizer["pattern"]:
        return ((kind, pre_tokenizer["pattern"]["Regex"]),)
    return ((json.dumps(pre_tokenizer, sort_keys=True),),)


def _short(rules: tuple[tuple[Any, ...], ...]) -> str:
    return " then ".join(str(rule[0])[:80] for rule in rules) or "nothing"


def _tokens(tokenizer: dict[str, Any], vocabulary: int, path: Path) -> tuple[list[str], list[int]]:
    """Each id's text and kind."""
    import gguf

    ids = dict(tokenizer["model"]["vocab"])
    kinds = dict.fromkeys(ids, gguf.TokenType.NORMAL)
    for added in tokenizer.get("added_tokens", []):
        ids[added["content"]] = added["id"]
        special = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        kinds[added["content"]] = special
    if max(ids.values()) >= vocabulary:
        raise UsageError(
            f"{path}: token {max(ids.values())}, and the embedding has {vocabulary} rows",
            remedy="the tokenizer does not belong to this model",
        )
    tokens = [f"[PAD{i}]" for i in range(vocabulary)]
    types = [int(gguf.TokenType.UNUSED)] * vocabulary
    for text, i in ids.items():
        tokens[i], types[i] = text, int(kinds[text])
    return tokens, types
