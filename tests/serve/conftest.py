"""A tiny random Llama with a tokenizer trained in place: real code paths, no downloads."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import httpx
import openai
import pytest
import torch
from serve_helpers import Live, assert_empty, running, serving
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tool_helpers import scripted, tool_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantkit.models.llama_family import build_decoder
from quantkit.models.runtime import Runtime
from quantkit.serve import sampler
from quantkit.serve.engine import Engine, EngineConfig

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "system user assistant: how are you today? Thank you, I am well.",
    "Größe, naïve café, 東京, 🙂 and other characters take several bytes.",
]
CONTEXT = 512


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices of 64 columns only get slower with more
    yield
    torch.set_num_threads(before)  # the bytes of a calibration depend on it


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_runtime(tokenizer: PreTrainedTokenizerFast, context: int = CONTEXT) -> Runtime:
    """A random model for a tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        eos_token_id=tokenizer.eos_token_id,
        # Wide enough that random weights have opinions and near-ties are rare.
        initializer_range=0.2,
    )
    return Runtime(
        model=LlamaForCausalLM(config).eval(),
        tokenizer=tokenizer,
        name="tiny",
        fingerprint={"kernels": "reference/f32"},
        size_bytes=0,
        bits_per_weight=32.0,
    )


@pytest.fixture(scope="session")
def runtime(tokenizer: PreTrainedTokenizerFast) -> Runtime:
    return tiny_runtime(tokenizer)


@pytest.fixture(scope="session")
def tool_runtime(tokenizer: PreTrainedTokenizerFast) -> Runtime:
    """A random model whose chat template takes tools, in Hermes' format, and writes reasoning."""
    return tiny_runtime(tool_tokenizer(tokenizer), context=2048)


@pytest.fixture(scope="session")
def native(runtime: Runtime) -> Runtime:
    """The same in the native decoder."""
    # A copy: the native decoder takes the weights away, and `runtime` is the oracle.
    return replace(runtime, decoder=build_decoder(copy.deepcopy(runtime.model)))


@pytest.fixture(params=["modules", "decoder"])
def engine(request: pytest.FixtureRequest, runtime: Runtime, native: Runtime) -> Iterator[Engine]:
    """A running engine whose small chunks make every longer prompt a chunked one."""
    served = native if request.param == "decoder" else runtime
    with running(served, max_sequences=4, prefill_chunk=16) as engine:
        yield engine


@pytest.fixture
def live(runtime: Runtime) -> Iterator[Callable[..., Live]]:
    """Starts servers; stops them and checks that nothing leaked."""
    with ExitStack() as stack:

        def start(config: EngineConfig | None = None, **options: object) -> Live:
            return stack.enter_context(serving(runtime, config, **options))

        yield start


@pytest.fixture
def server(live):
    return live()


@pytest.fixture
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


@pytest.fixture
def post(server) -> Iterator[Callable[[str, object], httpx.Response]]:
    """Sends JSON, or bytes as they are."""
    with httpx.Client(base_url=server.url, timeout=30) as http:

        def send(path: str, body: object) -> httpx.Response:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return http.post(path, content=content, headers={"content-type": "application/json"})

        yield send


@pytest.fixture
def unharmed(server: Live) -> Iterator[Live]:
    """A server; in the end it answers and holds nothing."""
    yield server
    assert_empty(server.engine)
    response = httpx.post(server.url + "/v1/completions", json={"prompt": "a", "max_tokens": 1})
    assert response.status_code == 200
    assert httpx.get(server.url + "/ready").status_code == 200


@pytest.fixture(scope="module")
def tools_server(tool_runtime: Runtime) -> Iterator[Live]:
    """A server whose model takes tools."""
    with serving(tool_runtime, EngineConfig(max_sequences=4)) as live:
        yield live


@pytest.fixture
def ask(tools_server: Live) -> openai.OpenAI:
    """A client of `tools_server`."""
    return openai.OpenAI(base_url=f"{tools_server.url}/v1", api_key="-", max_retries=0)


@pytest.fixture
def send(tools_server: Live) -> Callable[..., httpx.Response]:
    """Sends bodies to `tools_server` as they are, for short answers."""

    def post(path: str, **body: object) -> httpx.Response:
        given = {"max_tokens": 4} if path == "/v1/chat/completions" else {"max_output_tokens": 4}
        return httpx.post(tools_server.url + path, json=given | body, timeout=120)

    return post


@pytest.fixture
def say(tool_runtime: Runtime, monkeypatch) -> Callable[..., None]:
    """Makes the model say these texts, one request after the other."""

    def set_script(*texts: str) -> None:
        monkeypatch.setattr(sampler, "sample", scripted(tool_runtime.tokenizer, *texts))

    return set_script
