"""Answers of a busy server against `transformers.generate`, token by token.

    python -m benchmarks.serve_equality CKPT --text held_out.txt [--prompts 200] [--tokens 32]
        [--clients 16] [--longest 256] [--threads N] [-o FILE]

CKPT is loaded in fp32 and served over HTTP by the native decoder; where that does not run it, there
is nothing to prove. So many clients ask at once, greedily, and every other answer is streamed.
Prompts are token ids, 1 to ``--longest`` of them; every other one continues one of few beginnings.
Prefix cache and guesses are on. Half as many requests run as there are clients, and every fourth
client pays, so that requests of the others are stopped for his. Where any of that did not happen,
the run has shown less than it says, and fails.

The reference is the same checkpoint in transformers' own modules: each quantized layer is a plain
linear one in fp32, whose weight is code times scale. It reads one prompt at a time, because padding
changes the order of fp32 sums. A token of the server that is not the reference's is a divergence.
It is allowed where the reference prefers its own by no more than `NEAR`; the reference goes on from
the server's token then, so that the rest of the answer is compared as well.

Exit code 1 where an answer fails. Checkpoints that round activations or keys and values have no
such reference: sums in another order round to other codes there. They are refused.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from benchmarks.machine import hardware
from quantkit import numerics
from quantkit.layers import QuantLinear
from quantkit.model import set_submodule
from quantkit.models.load import load_runtime
from quantkit.models.runtime import Runtime
from quantkit.numerics import QTensor
from quantkit.schemes import ScaleFormat
from quantkit.serve.api.app import create_app
from quantkit.serve.api.server import Server, bind, url
from quantkit.serve.config import ServeConfig
from quantkit.serve.counters import Counters
from quantkit.serve.engine import Engine, EngineConfig
from quantkit.serve.keys import Key, digest
from quantkit.serve.policy.tiered import Tiered
from quantkit.serve.policy.tiers import Tenant, Tier
from quantkit.serve.speculation import SpeculativeConfig

#: Difference of two logits that fp32 sums in another order may turn round.
NEAR = 1e-4

#: Each tier has one tenant, whose key is its name.
TIERS = (Tier("paid", 8.0), Tier("free", 1.0))
ACCESS = ServeConfig(
    TIERS,
    tuple(Tenant(tier.name, tier.name) for tier in TIERS),
    tuple(Key(digest(tier.name), tier.name) for tier in TIERS),
    frozenset(),
)

BEGINNINGS = 4
SECONDS = 3600.0

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    """One token that is not the reference's.

    Attributes:
        at: its index in the answer.
        ours, theirs: the server's token, and the reference's in the same place.
        gap: by how much the reference's logit of its own exceeds that of ours.
    """

    at: int
    ours: int
    theirs: int
    gap: float

    @property
    def allowed(self) -> bool:
        return self.gap <= NEAR


def draw_prompts(ids: Sequence[int], count: int, longest: int, seed: int) -> list[Ids]:
    """Windows of a text; every other one continues one of `BEGINNINGS`, half as long as allowed.

    Raises:
        SystemExit: the text is shorter than the longest prompt.
    """
    if len(ids) < longest:
        raise SystemExit(f"the text has {len(ids)} tokens, fewer than one prompt of {longest}")
    rng = random.Random(seed)

    def window(tokens: int) -> Ids:
        begin = rng.randrange(len(ids) - tokens + 1)
        return tuple(ids[begin : begin + tokens])

    beginnings = [window(longest // 2) for _ in range(BEGINNINGS)]
    return [
        rng.choice(beginnings) + window(rng.randint(1, longest - longest // 2))
        if i % 2
        else window(rng.randint(1, longest))
        for i in range(count)
    ]


@contextmanager
def serving(runtime: Runtime, config: EngineConfig) -> Iterator[tuple[Engine, str]]:
    """The server that `quantkit serve` runs, in a thread: its engine and address."""
    engine = Engine(runtime, config, Tiered(TIERS)).start()
    sock, up = bind("127.0.0.1", 0), threading.Event()
    server = Server(create_app(engine, access=ACCESS), engine, drain_seconds=60, on_ready=up.set)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    try:
        if not up.wait(60):
            raise SystemExit("the server did not start")
        yield engine, url(sock)
    finally:
        server.should_exit = True
        thread.join(60)
        engine.stop()
        sock.close()


async def ask(
    client: httpx.AsyncClient, key: str, prompt: Ids, tokens: int, *, stream: bool
) -> list[int]:
    """The ids of one answer, past the end of text.

    Raises:
        SystemExit: the server refuses, fails, or says another number of tokens.
    """
    body = {
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": stream,
    }
    headers = {"Authorization": f"Bearer {key}"}
    response = await client.post("/v1/completions", json=body, headers=headers)
    if response.status_code != 200:
        raise SystemExit(f"status {response.status_code}: {response.text[:200]}")
    if stream:
        lines = [s.removeprefix("data: ") for s in response.text.splitlines() if s]
        if lines.pop() != "[DONE]":
            raise SystemExit(f"a stream without its end: {lines[-1:]}")
    else:
        lines = [response.text]
    documents = [json.loads(line) for line in lines]
    if errors := [document["error"] for document in documents if "error" in document]:
        raise SystemExit(f"a request failed: {errors[0]}")
    choices = [choice for document in documents for choice in document["choices"]]
    ids = [i for choice in choices for i in choice.get("token_ids") or ()]
    if len(ids) != tokens:
        raise SystemExit(f"an answer of {len(ids)} tokens where {tokens} were asked for")
    return ids


async def ask_all(
    address: str, prompts: Sequence[Ids], tokens: int, clients: int
) -> list[list[int]]:
    """All answers, in the prompts' order; so many clients ask at once."""
    left = iter(enumerate(prompts))
    answers: dict[int, list[int]] = {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)

    async def work(http: httpx.AsyncClient, key: str) -> None:
        for number, prompt in left:
            answers[number] = await ask(http, key, prompt, tokens, stream=number % 2 == 0)

    async with httpx.AsyncClient(
        base_url=address, timeout=SECONDS, trust_env=False, limits=limits
    ) as http:
        keys = [TIERS[bool(i % 4)].name for i in range(clients)]
        tasks = [asyncio.create_task(work(http, key)) for key in keys]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
    return [answers[number] for number in range(len(prompts))]


def serve(
    runtime: Runtime, prompts: Sequence[Ids], tokens: int, clients: int
) -> tuple[list[list[int]], Counters]:
    """What a busy server answers, and what its engine counted."""
    if runtime.decoder is None:
        raise SystemExit(f"the native decoder does not run this: {runtime.fallback}")
    longest = max(map(len, prompts)) + tokens
    config = EngineConfig(
        max_sequences=max(2, clients // 2),
        max_context=longest,
        prefill_chunk=longest // 3 + 1,
        speculative_config=SpeculativeConfig(prompt_lookup_min=1),
    )
    with serving(runtime, config) as (engine, address):
        return asyncio.run(ask_all(address, prompts, tokens, clients)), engine.counters


def missing(counters: Counters) -> list[str]:
    """What the run was to show equal answers under, and did not happen."""
    happened = {
        "no prompt was found in the prefix cache": counters.prefix_hits,
        "no token was guessed": counters.draft_tokens,
        "no request was stopped for another": counters.preemptions,
    }
    return [name for name, count in happened.items() if not count]


def load_reference(source: str) -> PreTrainedModel:
    """A checkpoint in transformers' modules, dequantized, in fp32.

    Raises:
        SystemExit: it rounds activations, or keys and values.
    """
    runtime = load_runtime(source, kernels="reference", dtype=torch.float32)
    if runtime.caches:
        raise SystemExit(f"{source}: rounds keys and values, which plain fp32 modules do not")
    dequantize(runtime.model, source)
    return runtime.model


def dequantize(model: nn.Module, source: str) -> None:
    """Put plain linear layers for quantized ones.

    Raises:
        SystemExit: a layer rounds its input.
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, QuantLinear)]
    for name, layer in layers:
        if layer.scheme.input is not None:
            raise SystemExit(
                f"{source}: {name} rounds its input ({layer.scheme.name}), and sums in another "
                "order round to other codes; take a weight-only checkpoint"
            )
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        plain.weight = nn.Parameter(plain_weight(layer), requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.float(), requires_grad=False)
        set_submodule(model, name, plain)


def plain_weight(layer: QuantLinear) -> torch.Tensor:
    """What a layer multiplies by, fp32 ``[N, K]``: code times scale, which kernels do not round to
    the scales' dtype either."""
    scale = layer.scale
    if layer.spec.scale is ScaleFormat.MODEL:
        scale = scale.float()
    q = QTensor(layer.codes, scale, layer.zero, layer.spec, layer.global_scale)
    weight = numerics.dequantize(q, torch.float32)
    if layer.order is None:
        return weight
    found = torch.empty_like(weight)
    found[:, layer.order] = weight
    return found


def find_differences(
    model: PreTrainedModel, prompt: Ids, answer: Sequence[int]
) -> list[Difference]:
    """Where the reference says something else, up to the first that is not allowed."""
    found: list[Difference] = []
    at = 0
    while at < len(answer):
        said, logits = generate(model, [*prompt, *answer[:at]], len(answer) - at)
        pairs = zip(said, answer[at:], strict=True)
        same = next((i for i, (theirs, ours) in enumerate(pairs) if theirs != ours), None)
        if same is None:
            break
        at += same
        ours, theirs = answer[at], said[same]
        gap = float(logits[same][theirs] - logits[same][ours])
        found.append(Difference(at, ours, theirs, gap))
        if not found[-1].allowed:
            break
        at += 1
    return found


def generate(
    model: PreTrainedModel, ids: Sequence[int], tokens: int
) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy tokens from transformers itself, past the end of text, and the logits of each."""
    # Settings that the checkpoint came with would fill what is left open here.
    model.generation_config = GenerationConfig()
    prompt = torch.tensor([list(ids)])
    output: Any = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),  # else it hides every token equal to the padding
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[0, len(ids) :].tolist(), [row[0].float() for row in output.logits]


def judge(
    model: PreTrainedModel, prompts: Sequence[Ids], answers: Sequence[Sequence[int]]
) -> list[list[Difference]]:
    """For each answer, where it is not the reference's."""
    found = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), start=1):
        found.append(find_differences(model, prompt, answer))
        print(f"compared {number} of {len(prompts)}", file=sys.stderr, flush=True)
    return found


def summarize(differences: Sequence[Sequence[Difference]], counters: Counters) -> dict[str, Any]:
    """Numbers of prompts by outcome, and every difference."""
    failed = [any(not d.allowed for d in one) for one in differences]
    return {
        "prompts": len(differences),
        "equal": sum(not one for one in differences),
        "allowed": sum(bool(one) and not bad for one, bad in zip(differences, failed, strict=True)),
        "failed": sum(failed),
        "differences": [
            {"prompt": i, **asdict(d), "allowed": d.allowed}
            for i, one in enumerate(differences)
            for d in one
        ],
        "counted": asdict(counters),
        "missing": missing(counters),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that `main` prints."""
    torch.set_num_threads(options.threads)
    runtime = load_runtime(options.checkpoint, dtype=torch.float32)
    text = options.text.read_text(encoding="utf-8")
    ids = runtime.tokenizer.encode(text, verbose=False)  # type: ignore[call-arg]
    prompts = draw_prompts(ids, options.prompts, options.longest, options.seed)
    answers, counters = serve(runtime, prompts, options.tokens, options.clients)
    fingerprint = dict(runtime.fingerprint)
    del runtime
    gc.collect()  # two models in fp32 need not fit
    differences = judge(load_reference(options.checkpoint), prompts, answers)
    names = ("prompts", "tokens", "clients", "longest", "seed", "threads")
    return {
        "hardware": hardware(options.threads),
        "checkpoint": Path(options.checkpoint).name,
        "fingerprint": fingerprint,
        "near": NEAR,
        "settings": {name: getattr(options, name) for name in names} | {"text": options.text.name},
        **summarize(differences, counters),
    }


def show(found: dict[str, Any]) -> None:
    """As text."""
    print(f"{found['checkpoint']}, {found['fingerprint']['kernels']}")
    print(f"{found['equal']} of {found['prompts']} answers are equal, token by token")
    print(f"{found['allowed']} diverge where the reference's logits are within {found['near']:g}")
    print(f"{found['failed']} fail")
    for d in found["differences"]:
        print(
            f"  prompt {d['prompt']}, token {d['at']}: {d['ours']} for {d['theirs']}, "
            f"gap {d['gap']:.2e}{'' if d['allowed'] else ': FAILED'}"
        )
    counted = found["counted"]
    print(
        f"prefix cache {counted['prefix_hits']} of {counted['prefix_queries']} tokens, guesses "
        f"{counted['accepted_tokens']} of {counted['draft_tokens']} right, "
        f"{counted['preemptions']} requests stopped for others"
    )
    for what in found["missing"]:
        print(f"nothing is shown of it: {what}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--text", type=Path, required=True, help="prompts are cut from it")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--clients", type=int, default=16, help="that ask at once")
    parser.add_argument("--longest", type=int, default=256, help="prompt, in tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    for name in ("prompts", "tokens", "clients", "longest", "threads"):
        if getattr(options, name) < (2 if name == "longest" else 1):
            parser.error(f"--{name}: {getattr(options, name)} is too few")
    found = run(options)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    show(found)
    sys.exit(bool(found["failed"] or found["missing"]))


if __name__ == "__main__":
    main()
