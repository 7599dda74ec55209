"""The native decoder beside transformers, on a small random model of each family."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit import ops
from quantkit.kv_cache import SIDES, CacheEntry, install_entry
from quantkit.models.decoder import Batch, Decoder
from quantkit.models.llama_family import FAMILIES, build_decoder, why_not
from quantkit.ops.page_store import CacheScales
from quantkit.recipe import KV_CACHES

COMMON = {
    "vocab_size": 211,
    "hidden_size": 96,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
#: (name, model type, what differs from COMMON)
VARIANTS = [
    ("llama", "llama", {}),
    ("llama-biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama-no-gqa", "llama", {"num_key_value_heads": 6, "head_dim": 48}),
    ("smollm-tied", "llama", {"tie_word_embeddings": True, "rope_theta": 100000.0}),
    (
        "llama3-rope",
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    ("mistral-window", "mistral", {"sliding_window": 37}),
    ("qwen2", "qwen2", {}),
    (
        "qwen2-window",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 1},
    ),
    ("qwen3", "qwen3", {"head_dim": 32}),
    ("gemma", "gemma", {"head_dim": 32}),
    (
        "gemma2",
        "gemma2",
        {
            "head_dim": 32,
            "sliding_window": 40,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    ("gemma3", "gemma3_text", {"head_dim": 32, "sliding_window": 40, "sliding_window_pattern": 2}),
]


def make(kind: str, extra: dict, dtype: torch.dtype = torch.float32):
    torch.manual_seed(5)
    config = AutoConfig.for_model(kind, **{**COMMON, **extra})
    config._attn_implementation = "eager"  # the only one that caps logits
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases are 1 and 0 until trained
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "proj" in name:
                parameter.mul_(2.0)
    return model


def tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(COMMON["vocab_size"], (count,), generator=generator).tolist()


@torch.no_grad()
def expected(model, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0].float()


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def run(decoder: Decoder, ids: list, past: list, pages: list, cache, *, last: bool = False):
    """Logits of every new token, or of each sequence's last."""
    ends = torch.tensor([len(x) for x in ids]).cumsum(0)
    rows = (ends - 1).tolist() if last else range(int(ends[-1]))
    return decoder.logits(Batch.of(ids, past, pages, rows=rows), cache)


def whole(decoder: Decoder, ids: list[int], dtype: str = "auto") -> torch.Tensor:
    return run(decoder, [ids], [0], [[3, 1, 7]], decoder.with_kv_dtype(dtype).new_cache(8))


def test_every_family_has_a_variant() -> None:
    assert {kind for _, kind, _ in VARIANTS} == set(FAMILIES)


@pytest.mark.parametrize(("kind", "extra"), [v[1:] for v in VARIANTS], ids=[v[0] for v in VARIANTS])
def test_fp32_agrees_with_transformers(kind: str, extra: dict) -> None:
    model = make(kind, extra)
    assert why_not(model) is None
    ids = tokens(150)
    wanted = expected(model, ids)
    assert relative(whole(build_decoder(model), ids), wanted) < 1e-5


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    if isa not in ops.available_isas():
        pytest.skip(f"this CPU does not run {isa}")
    model, exact = make("llama", {}, dtype), make("llama", {}).float()
    exact.load_state_dict(model.state_dict())
    ids = tokens(70)
    wanted = expected(exact, ids)
    limit = 1e-5 if dtype == torch.float32 else relative(expected(model, ids), wanted)
    ops.set_isa(isa)
    try:
        error = relative(whole(build_decoder(model), ids), wanted)
    finally:
        ops.set_isa("auto")
    # In bf16 as good as transformers' own bf16: less is rounded on the way.
    assert error < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv", ["auto", "bf16", "int8", "fp8"])
def test_chunks_batches_and_pages_change_no_bit(dtype: torch.dtype, kv: str) -> None:
    """A prompt at once, in chunks, beside others, in other pages: the same bits."""
    decoder = build_decoder(make("mistral", {"sliding_window": 100}, dtype))
    ids, other = tokens(170), tokens(40, seed=1)
    wanted = whole(decoder, ids, kv)

    cache = decoder.with_kv_dtype(kv).new_cache(12)
    got, done, others = [], 0, 0
    for count in (1, 7, 64, 1, 1, 60, 36):
        # The neighbour joins later and grows by a few tokens at a time.
        batch, past, pages = [ids[done : done + count]], [done], [[9, 0, 4]]
        if done >= 1 and others < 36:
            batch = [other[others : others + 4], *batch]
            past, pages = [others, done], [[2], *pages]
            others += 4
        out = run(decoder, batch, past, pages, cache)
        got.append(out[-count:])
        done += count
    assert torch.equal(torch.cat(got), wanted)


@pytest.mark.parametrize(("kind", "extra"), [v[1:] for v in VARIANTS], ids=[v[0] for v in VARIANTS])
def test_rows_that_nobody_reads_change_no_bit(kind: str, extra: dict) -> None:
    """Of a prompt a few tokens' logits, then the last: as if all were wanted."""
    decoder = build_decoder(make(kind, extra, torch.bfloat16))
    ids = tokens(150)
    wanted = whole(decoder, ids)
    cache = decoder.new_cache(8)
    some = [0, 2, 61]
    got = decoder.logits(Batch.of([ids[:80]], [0], [[3, 1, 7]], rows=some), cache)
    assert torch.equal(got, wanted[some])
    last = run(decoder, [ids[80:]], [80], [[3, 1, 7]], cache, last=True)
    assert torch.equal(last, wanted[-1:])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads: int) -> None:
    decoder = build_decoder(make("llama", {}, torch.bfloat16))
    ids = tokens(140)
    wanted = whole(decoder, ids)
    ops.set_num_threads(threads)
    try:
        assert torch.equal(whole(decoder, ids), wanted)
    finally:
        ops.set_num_threads(0)


@pytest.mark.parametrize(
    ("kv", "limit"), [("fp32", 1e-5), ("bf16", 1e-2), ("int8", 2e-2), ("fp8", 8e-2)]
)
def test_cache_types(kv: str, limit: float) -> None:
    model = make("llama", {})
    ids = tokens(150)
    wanted = expected(model, ids)
    assert relative(whole(build_decoder(model), ids, kv), wanted) < limit


def fixed_scales(kv: str) -> CacheScales:
    """Of 3 layers; the first layer's values saturate."""
    step = 0.02 if kv == "int8" else 0.006
    return CacheScales(kv, torch.tensor([[step, step / 20], [step, step], [2 * step, step]]))


@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_calibrated_cache_scales_round_as_the_modules_do(kv: str) -> None:
    model, ids = make("llama", {}), tokens(100)
    plain, scales = expected(model, ids), fixed_scales(kv)
    for block, (keys, values) in zip(model.model.layers, scales.fixed, strict=True):
        found = dict(zip(SIDES, (keys.reshape(1), values.reshape(1)), strict=True))
        install_entry(block.self_attn, CacheEntry(KV_CACHES[kv], found))
    wanted = expected(model, ids)
    decoder = build_decoder(model, cache_scales=scales)
    assert decoder.numerics.endswith(f"+kv-{kv}-static")
    cache = decoder.new_cache(8)
    got = run(decoder, [ids], [0], [[3, 1]], cache)
    assert relative(wanted, plain) > 0.05
    assert relative(got, wanted) < 0.01
    assert cache.scale is not None
    stored = cache.scale[:, 3].transpose(1, 2)  # [layers, 2, heads, tokens] of a full page
    assert torch.equal(stored, scales.fixed[:, :, None, None].expand_as(stored))
    own = run(
        decoder, [ids], [0], [[3, 1]], decoder.with_kv_dtype(kv).new_cache(8)
    )  # a scale for each token
    assert relative(own, plain) < relative(got, plain)


def test_long_context_is_divided_among_threads() -> None:
    """One token behind 500: its spans are separate units, merged in order."""
    model = make("llama", {})
    ids = tokens(500)
    wanted = expected(model, ids)[-1:]
    decoder = build_decoder(model)
    cache = decoder.new_cache(8)
    pages = [[7, 6, 5, 4, 3, 2, 1, 0]]
    decoder.states(Batch.of([ids[:-1]], [0], pages), cache)
    got = run(decoder, [ids[-1:]], [499], pages, cache)
    assert relative(got, wanted) < 1e-5
    everything = run(decoder, [ids], [0], pages, decoder.new_cache(8), last=True)
    assert torch.equal(got, everything)


def test_states_and_head_are_the_logits() -> None:
    decoder = build_decoder(make("gemma2", {"head_dim": 32, "final_logit_softcapping": 5.0}))
    ids = tokens(30)
    states = decoder.states(Batch.of([ids], [0], [[0]]), decoder.new_cache(1))
    logits = run(decoder, [ids], [0], [[0]], decoder.new_cache(1))
    assert torch.equal(decoder.head(states), logits)


def test_a_page_full_of_nan_does_not_leak() -> None:
    """What the last owner of a page left there reaches nobody."""
    decoder = build_decoder(make("llama", {}))
    ids = tokens(90)
    wanted = whole(decoder, ids)
    cache = decoder.new_cache(8)
    cache.data.view(torch.float32).fill_(float("nan"))
    got = run(decoder, [ids], [0], [[3, 1]], cache)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("kv", [None, "int8", "fp8"])
def test_a_nan_stays_with_its_sequence(kv: str | None) -> None:
    """Calibrated scales saturate what they do not span, but never a NaN."""
    model = make("llama", {})
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    decoder = build_decoder(model, cache_scales=fixed_scales(kv) if kv else None)
    sick, well = [7, 8, 9], [8, 9, 10, 11]
    out = run(decoder, [sick, well], [0, 0], [[0], [1]], decoder.new_cache(2))
    assert not torch.isfinite(out[:3]).any()
    alone = run(decoder, [well], [0], [[0]], decoder.new_cache(1))
    assert torch.equal(out[3:], alone)


@pytest.mark.parametrize(
    ("tokens_", "past", "pages"),
    [
        ([[211]], [0], [[0]]),  # an id beyond the vocabulary
        ([[-1]], [0], [[0]]),
        ([[1]], [0], [[2]]),  # a page that is not there
        ([[1]], [64], [[0]]),  # a position without a page
        ([[1]], [4096], [[0] * 65]),  # beyond the longest position
    ],
)
def test_bad_batches_are_refused(tokens_: list, past: list, pages: list) -> None:
    from quantkit.errors import QuantkitError

    decoder = build_decoder(make("llama", {}))
    with pytest.raises(QuantkitError, match="refuses a forward pass"):
        run(decoder, tokens_, past, pages, decoder.new_cache(2))


@pytest.mark.parametrize(
    ("kind", "extra", "reason"),
    [
        ("gpt_neox", {"rotary_pct": 0.25}, "architecture 'gpt_neox'"),
        ("llama", {"head_dim": 24}, "head_dim 24"),
        ("llama", {"hidden_act": "relu"}, "activation 'relu'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rotary scaling 'dynamic'",
        ),
    ],
)
def test_what_is_not_native_says_why(kind: str, extra: dict, reason: str) -> None:
    assert reason in str(why_not(make(kind, extra)))


def test_weights_are_not_held_twice() -> None:
    model = make("llama", {"tie_word_embeddings": True})
    build_decoder(model)
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    assert model.lm_head.weight.is_meta
    assert not model.model.embed_tokens.weight.is_meta
    with pytest.raises(RuntimeError, match="moved to its native decoder"):
        model(torch.tensor([[1, 2]]))


def test_what_a_step_reads() -> None:
    model = make("llama", {})
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    weights = sum(m.weight.numel() for m in linears)
    native = build_decoder(model).native
    assert native.block_weights == weights - model.lm_head.in_features * model.lm_head.out_features
    # fp32 values, rows padded to whole blocks of 16, and one scale a row.
    assert 4 * weights <= native.weight_nbytes <= 1.2 * 4 * weights


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_whatever_the_program_holds_for_the_default_dtype(kv: str) -> None:
    """Native code writes fp32, so a narrower result would be written past its end."""
    decoder = build_decoder(make("llama", {}))
    ids = tokens(70)
    wanted = whole(decoder, ids, kv)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = whole(decoder, ids, kv)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    assert torch.equal(got, wanted)


def test_states_of_another_dtype_are_refused() -> None:
    decoder = build_decoder(make("llama", {}))
    states = torch.zeros(2, COMMON["hidden_size"])
    assert decoder.head(states).shape == (2, COMMON["vocab_size"])
    for wrong in (states.bfloat16(), states[:, 1:]):
        with pytest.raises(ValueError, match="must be contiguous fp32"):
            decoder.head(wrong)
