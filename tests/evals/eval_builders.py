"""A tiny random Llama with a byte tokenizer, and suites in a temporary folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantkit.models.runtime import Runtime

WORDS = ("the", "and", "ing", "refund", "invoice", "order", "late", "paris", "rome")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few merged words, so that choices have one token or several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = "Ġ"
        for letter in word:
            if (left, letter) not in merges:
                merges.append((left, letter))
            left += letter
            vocab.setdefault(left, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def tiny_runtime(seed: int = 0, *, scale: float = 8.0, vocab: int | None = None) -> Runtime:
    """Two layers of 64, fp32. ``scale`` sharpens the logits, so that argmax is not a tie."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=vocab or len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return Runtime(
        model=model,
        tokenizer=tokenizer,
        name=f"tiny-{seed}",
        fingerprint={"model": f"sha-{seed}", "tokenizer": "bytes", "chat_template": ""},
        size_bytes=1000,
        bits_per_weight=32.0,
    )


CHOICE = {
    "task": "tiny_choice",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "Message: {{message}}\nIt is about",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc"}],
}

GENERATE = {
    "task": "tiny_generate",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "Say {{word}}:",
    "doc_to_target": "{{word}}",
    "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "ignore_case": True}],
}


def choice_rows(n: int = 12) -> list[dict[str, Any]]:
    """Items with one-token and longer choices, in two slices; neighbours share a cluster."""
    choices = [["refund", "invoice", "order", "late"], ["the order is late", "paris", "rome and"]]
    return [
        {
            "id": f"c-{i:02d}",
            "message": f"where is {'my parcel ' * (i % 4)}number {i}?",
            "choices": choices[i % 2],
            "label": i % len(choices[i % 2]),
            "slice": "even" if i % 2 == 0 else "odd",
            "cluster": f"p{i // 2}",
            "must_not_flip": i == 3,
        }
        for i in range(n)
    ]


def write_suite(
    folder: Path, config: dict[str, Any], rows: list[dict[str, Any]], **changes: Any
) -> Path:
    """Write ``suite.yaml`` and ``rows.jsonl``; a change to None drops the key."""
    folder.mkdir(parents=True, exist_ok=True)
    merged = {k: v for k, v in {**config, **changes}.items() if v is not None}
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(merged, sort_keys=False, allow_unicode=True))
    return path
