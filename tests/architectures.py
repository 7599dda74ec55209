"""Tiny random models of every family of architectures that quantkit calibrates."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.conftest import byte_tokenizer

TEXT = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "eos_token_id": 256,
    "bos_token_id": 256,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        model: name of the class in transformers.
        options: of its config.
        auto: transformers' Auto class for it.
        layers: quantized layers in each block.
        blocks: in all stacks.
        kept: parts of names of linear layers that stay as they are.
        renamed: a part of a name in memory → on disk, where they differ.
    """

    model: str
    options: Mapping[str, Any]
    layers: int
    auto: str = "AutoModelForCausalLM"
    blocks: int = 2
    kept: tuple[str, ...] = ("lm_head",)
    renamed: Mapping[str, str] = field(default_factory=dict)


def _llava() -> dict[str, Any]:
    return {
        "text_config": transformers.LlamaConfig(**GROUPED),
        "vision_config": transformers.CLIPVisionConfig(**VISION, projection_dim=32),
        "image_token_index": 270,
    }


ARCHITECTURES: dict[str, Architecture] = {
    "mixtral": Architecture(
        "MixtralForCausalLM",
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
        layers=4 + 3 * 4,
        renamed={".mlp.": ".block_sparse_moe."},
    ),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM",
        {
            **GROUPED,
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "decoder_sparse_step": 1,
        },
        layers=4 + 3 * 8,
    ),
    "gpt_neox": Architecture(
        "GPTNeoXForCausalLM", TEXT, layers=4, renamed={"lm_head.": "embed_out."}
    ),
    "gptj": Architecture(
        "GPTJForCausalLM",
        {
            "vocab_size": 272,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_inner": 128,
            "n_positions": 256,
            "rotary_dim": 8,
            "bos_token_id": 256,
            "eos_token_id": 256,
        },
        layers=6,
    ),
    "phi": Architecture("PhiForCausalLM", TEXT, layers=6),
    "gemma2": Architecture("Gemma2ForCausalLM", {**GROUPED, "head_dim": 16}, layers=7),
    "gemma3": Architecture(
        "Gemma3ForCausalLM", {**GROUPED, "head_dim": 16, "sliding_window": 32}, layers=7
    ),
    "bert": Architecture("BertModel", TEXT, layers=6, auto="AutoModel", kept=("pooler.dense",)),
    "bert-masked": Architecture(
        "BertForMaskedLM", TEXT, layers=6, auto="AutoModelForMaskedLM", kept=("cls.predictions",)
    ),
    "modernbert": Architecture(
        "ModernBertModel",
        {**TEXT, "pad_token_id": 256, "cls_token_id": 257, "sep_token_id": 258},
        layers=4,
        auto="AutoModel",
        kept=(),
    ),
    "llava": Architecture(
        "LlavaForConditionalGeneration",
        {},
        layers=7,
        auto="AutoModelForImageTextToText",
        kept=("lm_head", "vision_tower", "multi_modal_projector"),
    ),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        {
            "vocab_size": 272,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "num_mel_bins": 80,
            "max_source_positions": 50,
            "max_target_positions": 64,
            "decoder_start_token_id": 257,
            "pad_token_id": 256,
            "bos_token_id": 256,
            "eos_token_id": 256,
            "suppress_tokens": [],
            "begin_suppress_tokens": [],
        },
        layers=8,
        auto="AutoModelForSpeechSeq2Seq",
        blocks=4,
        kept=("proj_out",),
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        {
            "vocab_size": 272,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 256,
            "pad_token_id": 256,
            "eos_token_id": 256,
        },
        layers=9,
        auto="AutoModelForSeq2SeqLM",
        blocks=4,
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """A random model with weights large enough that its logits are no noise."""
    row = ARCHITECTURES[name]
    options = _llava() if name == "llava" else dict(row.options)
    make = getattr(transformers, row.model)
    torch.manual_seed(0)
    model = make(make.config_class(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and name != "t5":  # whose first weights are large
                parameter.mul_(3.0)
    return model.to(dtype).eval()


def save(name: str, folder: Path) -> Path:
    """The model, its tokenizer and, for audio, its feature extractor."""
    build(name).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    if "bert" in name:
        tokenizer.cls_token, tokenizer.sep_token = "<|im_start|>", "<|im_end|>"
    tokenizer.save_pretrained(folder)
    if name == "whisper":
        transformers.WhisperFeatureExtractor(feature_size=80, chunk_length=1).save_pretrained(
            folder
        )
    return folder


def spoken(folder: Path, clips: int = 6) -> Path:
    """A JSONL of noise with transcripts."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(clips):
        with wave.open(str(folder / f"{i}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            file.writeframes((rng.normal(size=8000) * 3000).astype("<i2").tobytes())
        rows.append({"audio": f"{i}.wav", "text": f"clip number {i} says little"[: 12 + i]})
    path = folder / "clips.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_model(name: str, model: Any) -> torch.Tensor:
    """Logits, or an encoder's last hidden states, of a fixed input."""
    ids = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(5))
    inputs: dict[str, Any] = {"input_ids": ids}
    if name == "whisper":
        heard = torch.randn(1, 80, 100, generator=torch.Generator().manual_seed(6))
        inputs = {"input_features": heard, "decoder_input_ids": ids}
    elif name == "t5":
        inputs["decoder_input_ids"] = ids[:, :9]
    with torch.no_grad():
        out = model(**inputs)
    states: torch.Tensor = out.logits if "logits" in out else out.last_hidden_state
    return states.float()


#: Name → a model's folder, made once a session.
Saved = Callable[[str], Path]
