"""QuantkitLM against lm-eval's own HFLM, and against itself in other company."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from eval_builders import tiny_runtime
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.errors import QuantkitError
from quantkit.evals.forward import TREE_ARCHITECTURES, ModuleForward
from quantkit.evals.language_model import QuantkitLM
from quantkit.models.runtime import Runtime

CONTEXTS = (
    "Question: where is my parcel?\nAnswer:",
    "Question: where is my parcel?\nAnswer: ",  # trailing space moves to the continuation
    "Question: where is my parcel? It was due on Monday.\nAnswer:",
    "short",
    "",
    "word " * 60,  # longer than the model takes
)
CONTINUATIONS = (" refund", " invoice", " the order is late", " zqx", " refund and more")


def requests(kind: str, args: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, a, i) for i, a in enumerate(args)]


def pairs() -> list[Instance]:
    return requests("loglikelihood", [(c, t) for c in CONTEXTS for t in CONTINUATIONS])


@pytest.fixture(scope="module")
def hflm(runtime: Runtime) -> HFLM:
    return HFLM(pretrained=runtime.model, tokenizer=runtime.tokenizer, batch_size=4)


def assert_same(got: list[tuple[float, bool]], wanted: list[tuple[float, bool]]) -> None:
    for (a, a_greedy), (b, b_greedy) in zip(got, wanted, strict=True):
        assert a == pytest.approx(b, abs=1e-4, rel=1e-5)
        assert a_greedy == b_greedy


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("budget", [16, 256, 2048])
def test_loglikelihood_is_that_of_hflm(
    runtime: Runtime, hflm: HFLM, tree: bool, budget: int
) -> None:
    lm = QuantkitLM(runtime, tree=tree, budget=budget)
    assert_same(lm.loglikelihood(pairs()), hflm.loglikelihood(pairs(), disable_tqdm=True))


def test_argmax_over_choices_is_that_of_hflm(runtime: Runtime, hflm: HFLM) -> None:
    n = len(CONTINUATIONS)
    ours = [v for v, _ in QuantkitLM(runtime).loglikelihood(pairs())]
    theirs = [v for v, _ in hflm.loglikelihood(pairs(), disable_tqdm=True)]
    for i in range(0, len(ours), n):
        best = max(range(n), key=lambda k: ours[i + k])
        assert best == max(range(n), key=lambda k: theirs[i + k])


def test_greedy_continuation_is_recognised(runtime: Runtime, hflm: HFLM) -> None:
    context = "Say it:"
    ids = runtime.tokenizer.encode(context)
    for _ in range(3):
        logits = runtime.model(torch.tensor([ids])).logits
        ids.append(int(logits[0, -1].argmax()))
    (answer,) = QuantkitLM(runtime).score([(ids[:-3], ids[-3:])])
    assert answer[1]
    (wrong,) = QuantkitLM(runtime).score([(ids[:-3], [*ids[-3:-1], (ids[-1] + 1) % 200])])
    assert not wrong[1]
    assert wrong[0] < answer[0]


@pytest.mark.parametrize("tree", [True, False])
def test_scores_do_not_depend_on_the_company(runtime: Runtime, tree: bool) -> None:
    lm = QuantkitLM(runtime, tree=tree)
    together = lm.loglikelihood(pairs())
    alone = [lm.loglikelihood([p])[0] for p in pairs()]
    shuffled = list(range(len(together)))
    random.Random(0).shuffle(shuffled)
    permuted = lm.loglikelihood([pairs()[i] for i in shuffled])
    assert_same(together, alone)
    assert_same(permuted, [together[i] for i in shuffled])


def test_repeated_runs_are_equal(runtime: Runtime) -> None:
    lm = QuantkitLM(runtime)
    assert lm.loglikelihood(pairs()) == lm.loglikelihood(pairs())


@pytest.mark.parametrize("tree", [True, False])
def test_rolling_is_that_of_hflm(runtime: Runtime, hflm: HFLM, tree: bool) -> None:
    texts = requests("loglikelihood_rolling", [("the order is late. " * k,) for k in (1, 7, 40)])
    ours = QuantkitLM(runtime, tree=tree).loglikelihood_rolling(texts)
    theirs = hflm.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("until", [["\n"], ["e", "the"], []])
def test_generation_is_that_of_hflm(
    runtime: Runtime, hflm: HFLM, tree: bool, until: list[str]
) -> None:
    options = {"until": until, "max_gen_toks": 10, "do_sample": False}
    prompts = requests("generate_until", [(f"{c} {i}", options) for i, c in enumerate(CONTEXTS)])
    prompts += requests("generate_until", [("one more", {**options, "max_gen_toks": 3})])
    ours = QuantkitLM(runtime, tree=tree).generate_until(prompts)
    theirs = [hflm.generate_until([p], disable_tqdm=True)[0] for p in prompts]
    assert ours == theirs


def test_generation_of_a_model_without_a_generation_config(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"until": [], "max_gen_toks": 10, "do_sample": False}
    prompts = requests("generate_until", [("where is my parcel", options)])
    wanted = QuantkitLM(runtime).generate_until(prompts)
    monkeypatch.setattr(runtime.model, "generation_config", None)
    assert QuantkitLM(runtime).generate_until(prompts) == wanted


def test_shared_prefixes_are_computed_once(runtime: Runtime) -> None:
    lm = QuantkitLM(runtime, budget=2048)
    computed = 0
    states = lm.forward.states

    def count(tokens: torch.Tensor, **kw: Any) -> torch.Tensor:
        nonlocal computed
        computed += tokens.numel()
        return states(tokens, **kw)

    lm.forward.states = count  # type: ignore[method-assign]
    context = list(range(10, 60))
    lm.score([(context, [k]) for k in range(4)])
    assert computed == 50  # one-token choices cost nothing beyond their context
    computed = 0
    lm.score([(context, [k, 1, 2]) for k in range(4)])
    assert computed == 50 + 4 * 2


def test_progress_reaches_the_total(runtime: Runtime) -> None:
    seen: list[tuple[int, int, str]] = []
    lm = QuantkitLM(runtime, progress=lambda *a: seen.append(a), budget=32)
    lm.label = "suite"
    lm.loglikelihood(pairs())
    assert [d for d, _, _ in seen] == sorted(d for d, _, _ in seen)
    assert seen[-1] == (len(pairs()), len(pairs()), "suite")


def test_nan_logits_are_an_error() -> None:
    broken = tiny_runtime()
    with torch.no_grad():
        broken.model.lm_head.weight[5] = float("nan")
    with pytest.raises(QuantkitError, match="NaN or infinity"):
        QuantkitLM(broken).loglikelihood(pairs())


def test_a_continuation_without_tokens_is_an_error(runtime: Runtime) -> None:
    with pytest.raises(QuantkitError, match="no token of its own"):
        QuantkitLM(runtime).loglikelihood(requests("loglikelihood", [("context", "")]))


@pytest.mark.parametrize("architecture", TREE_ARCHITECTURES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_tree_architecture_scores_as_without_trees(
    runtime: Runtime, architecture: str, attention: str
) -> None:
    small = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "initializer_range": 0.3,
        "sliding_window": None,
        "num_local_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    }
    config = AutoConfig.for_model(architecture, **small)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    scored = Runtime(model, runtime.tokenizer, architecture, {}, 0, 32.0)
    context = list(range(20, 40))
    wanted = [(context, [3, 4, 5]), (context, [3, 9]), (context[:7], [8, 8, 8, 8]), ([2], [3])]
    packed = QuantkitLM(scored, tree=True)
    assert packed.forward.tree, "the architecture is in the table but its config refuses trees"
    plain = [QuantkitLM(scored, tree=False, budget=1).score([pair])[0] for pair in wanted]
    assert_same(packed.score(wanted), plain)


def test_an_unknown_architecture_is_scored_plainly(runtime: Runtime) -> None:
    """GPT-2: learned positions, and not in the table."""
    config = AutoConfig.for_model(
        "gpt2", vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    lm = QuantkitLM(Runtime(model, runtime.tokenizer, "gpt2", {}, 0, 32.0))
    assert not lm.forward.tree
    hf = HFLM(pretrained=model, tokenizer=runtime.tokenizer, batch_size=1)
    subset = pairs()[:10]
    assert_same(lm.loglikelihood(subset), hf.loglikelihood(subset, disable_tqdm=True))
    prompts = requests("generate_until", [("say", {"until": ["e"], "max_gen_toks": 5})])
    assert lm.generate_until(prompts) == hf.generate_until(prompts, disable_tqdm=True)


def test_a_scaled_head_is_not_split(runtime: Runtime) -> None:
    """Granite divides its logits, so head(base(x)) is not what the model computes."""
    config = AutoConfig.for_model(
        "granite",
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        logits_scaling=4.0,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    forward = ModuleForward(model)
    assert not forward.split
    tokens = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(
        forward.logits(forward.states(tokens)[0]), model(tokens).logits[0], rtol=0, atol=0
    )
    assert ModuleForward(runtime.model).split
