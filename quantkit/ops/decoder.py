"""The native decoder: a whole forward pass of a Llama-family model in one call.

These are the structures of ``csrc/include/quantkit/decoder.h`` and a handle that keeps the tensors
they point at alive. What a model's modules are in these terms is `quantkit.models.llama_family`'s
business.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.ops.library import CPU
from quantkit.ops.page_store import KV_DTYPES, PAGE_TOKENS, CacheScales, CCache, PageStore

FORMATS: Mapping[str, int] = MappingProxyType({"w4": 0, "int8": 1, "fp8": 2, "bf16": 3, "fp32": 4})
ACTIVATIONS: Mapping[str, int] = MappingProxyType(
    {"float": 0, "int8": 1, "int8-static": 2, "fp8": 3, "fp8-static": 4}
)
GATES: Mapping[str, int] = MappingProxyType({"silu": 0, "gelu_tanh": 1})
PRECISIONS: Mapping[str, int] = MappingProxyType({"fp32": 0, "bf16": 1})
PARTS = ("norm", "linear", "rope", "attention", "gate", "head", "total", "lifetime")
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_pointer, _i32, _i64, _f32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class _CLinear(ctypes.Structure):
    _fields_ = (
        ("format", _i32),
        ("activation", _i32),
        ("n", _i64),
        ("k", _i64),
        ("group_size", _i64),
        ("act_group", _i64),
        ("act_scale", _f32),
        ("scale_dtype", _i32),
        ("packed", _pointer),
        ("lut", _pointer),
        ("scale", _pointer),
        ("scale_stride", _i64),
        ("zero", _pointer),
        ("bias", _pointer),
    )


class _CProjection(ctypes.Structure):
    _fields_ = (("parts", ctypes.POINTER(_CLinear)), ("count", _i32))


class _CLayer(ctypes.Structure):
    _fields_ = (
        ("attention_norm", _pointer),
        ("qkv", _CProjection),
        ("q_norm", _pointer),
        ("k_norm", _pointer),
        ("attention_out", _CProjection),
        ("post_attention_norm", _pointer),
        ("mlp_norm", _pointer),
        ("gate_up", _CProjection),
        ("down", _CProjection),
        ("post_mlp_norm", _pointer),
        ("rope_cos", _pointer),
        ("rope_sin", _pointer),
        ("window", _i64),
    )


class _CHadamard(ctypes.Structure):
    _fields_ = (("order", _i64), ("base", _i64), ("factor", _pointer))


class _CConfig(ctypes.Structure):
    _fields_ = (
        ("precision", _i32),
        ("gate", _i32),
        ("layers", _i64),
        ("hidden", _i64),
        ("ffn", _i64),
        ("vocab", _i64),
        ("heads", _i64),
        ("kv_heads", _i64),
        ("head_dim", _i64),
        ("rotary_dim", _i64),
        ("max_positions", _i64),
        ("norm_epsilon", _f32),
        ("attention_scale", _f32),
        ("attention_softcap", _f32),
        ("logit_softcap", _f32),
        ("embedding_scale", _f32),
        ("embedding", _pointer),
        ("embedding_dtype", _i32),
        ("final_norm", _pointer),
        ("head", _CLinear),
    )


class _CBatch(ctypes.Structure):
    _fields_ = (
        ("sequences", _i64),
        ("tokens", _pointer),
        ("starts", _pointer),
        ("past", _pointer),
        ("pages", _pointer),
        ("page_stride", _i64),
        ("kv", ctypes.POINTER(CCache)),
        ("logit_rows", _pointer),
        ("logit_count", _i64),
        ("logits", _pointer),
        ("states", _pointer),
    )


@dataclass(frozen=True)
class Linear:
    """A linear layer ``[n, k]`` as the decoder runs it.

    Attributes:
        format: a key of `FORMATS`.
        packed: the packed codes or values.
        scale: fp32 or bf16 ``[n, groups]`` from `quantkit.ops.pack_scale` (n is dense).
        group_size: columns that share a weight scale; k for one group a row.
        activation: a key of `ACTIVATIONS`: what becomes of the layer's input.
        act_group: columns that share an activation scale.
        act_scale: of a static activation.
        lut: fp32 ``[16]`` of format w4.
        zero: fp32 like scale, or None.
        bias: fp32 ``[n]``, or None.
    """

    format: str
    n: int
    k: int
    packed: Tensor
    scale: Tensor
    group_size: int
    activation: str = "float"
    act_group: int = 0
    act_scale: float = 0.0
    lut: Tensor | None = None
    zero: Tensor | None = None
    bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads of it: codes, scales and zero points."""
        tensors = (self.packed, self.scale, self.zero)
        return sum(t.nbytes for t in tensors if t is not None)


@dataclass(frozen=True)
class Hadamard:
    """A product of a layer's input: see `quantkit.ops.hadamard`."""

    order: int
    factor: Tensor


@dataclass(frozen=True)
class Layer:
    """One block. Norm weights are fp32; rope tables fp32 ``[positions, rotary_dim / 2]``; what
    multiplies the input of ``down``, or None."""

    attention_norm: Tensor
    qkv: tuple[Linear, ...]
    attention_out: tuple[Linear, ...]
    mlp_norm: Tensor
    gate_up: tuple[Linear, ...]
    down: tuple[Linear, ...]
    rope_cos: Tensor
    rope_sin: Tensor
    window: int = 0
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    post_attention_norm: Tensor | None = None
    post_mlp_norm: Tensor | None = None
    down_hadamard: Hadamard | None = None

    def linears(self) -> tuple[Linear, ...]:
        return (*self.qkv, *self.attention_out, *self.gate_up, *self.down)


@dataclass(frozen=True)
class Shape:
    """Sizes and constants of a decoder; see ``qk_decoder_config``."""

    hidden: int
    ffn: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    max_positions: int
    norm_epsilon: float
    attention_scale: float
    gate: str = "silu"
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0


class NativeDecoder:
    """A handle on ``qk_decoder``.

    Args:
        shape: sizes and constants.
        precision: a key of `PRECISIONS`.
        layers: the blocks.
        embedding: ``[vocab, hidden]``, fp32, fp16 or bf16.
        final_norm: fp32 ``[hidden]``.
        head: the output projection.
        cache_scales: what caches round by unless another type is asked for; None for the type
            of the precision.

    Attributes:
        weight_nbytes: packed weights, scales and zero points of all linear layers: what a decode
            step reads once.
        block_weights: weights of the blocks' linear layers, by number.

    Raises:
        KernelMissingError: the CPU library is not built.
        QuantkitError: the library refuses the description.
    """

    def __init__(
        self,
        shape: Shape,
        precision: str,
        layers: Sequence[Layer],
        embedding: Tensor,
        final_norm: Tensor,
        head: Linear,
        cache_scales: CacheScales | None = None,
    ) -> None:
        self.shape = shape
        self.cache_scales = cache_scales
        self.precision = precision
        inside = [linear for layer in layers for linear in layer.linears()]
        self.block_weights = sum(linear.n * linear.k for linear in inside)
        self.weight_nbytes = sum(linear.nbytes for linear in (*inside, head))
        self._library = CPU.require()
        self._library.qk_status_message.restype = ctypes.c_char_p
        self._library.qk_kv_page_bytes.restype = _i64
        self._destroy = self._library.qk_decoder_destroy
        self._forward = self._library.qk_decoder_forward
        self._batch = _CBatch()  # one call at a time, so one is enough
        self._batch_pointer = ctypes.pointer(self._batch)
        self._kept: list[object] = []
        blocks = (_CLayer * max(1, len(layers)))(*(self._layer(layer) for layer in layers))
        config = _CConfig(
            precision=PRECISIONS[precision],
            gate=GATES[shape.gate],
            layers=len(layers),
            hidden=shape.hidden,
            ffn=shape.ffn,
            vocab=shape.vocab,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            rotary_dim=shape.rotary_dim,
            max_positions=shape.max_positions,
            norm_epsilon=shape.norm_epsilon,
            attention_scale=shape.attention_scale,
            attention_softcap=shape.attention_softcap,
            logit_softcap=shape.logit_softcap,
            embedding_scale=shape.embedding_scale,
            embedding=self._data(embedding),
            embedding_dtype=_DTYPES[embedding.dtype],
            final_norm=self._floats(final_norm),
            head=self._linear(head),
        )
        self.layers = len(layers)
        self._handle: ctypes.c_void_p | None = None
        handle = _pointer()
        self._check(
            self._library.qk_decoder_create(ctypes.byref(config), blocks, ctypes.byref(handle)),
            "the description of the model",
        )
        self._handle = handle
        for index, layer in enumerate(layers):
            if layer.down_hadamard is not None:
                self._rotate_down(index, layer.down_hadamard)

    def _rotate_down(self, index: int, hadamard: Hadamard) -> None:
        base = hadamard.factor.shape[0]
        told = _CHadamard(hadamard.order, base, self._floats(hadamard.factor))
        status = self._library.qk_decoder_rotate_down(self._handle, _i64(index), ctypes.byref(told))
        self._check(status, f"a Hadamard matrix of order {hadamard.order} in layer {index}")

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Free the native half; the tensors live on in whoever else has them."""
        handle, self._handle = getattr(self, "_handle", None), None
        if handle:
            self._destroy(handle)

    def forward(
        self,
        tokens: array[int],
        starts: array[int],
        past: array[int],
        pages: array[int],
        page_stride: int,
        store: PageStore,
        *,
        logit_rows: array[int] | None = None,
        logits: Tensor | None = None,
        states: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Run new tokens of several sequences and store their keys and values.

        Args:
            tokens: ids of all new tokens, sequence after sequence. This and the other arrays
                hold C ints (``array("i")``).
            starts: ``[sequences + 1]``, where each sequence's tokens begin.
            past: ``[sequences]``, tokens that its pages hold already.
            pages: ``[sequences, page_stride]``, page numbers, row after row.
            page_stride: page numbers of a sequence.
            store: where keys and values are.
            logit_rows: ascending: the new tokens whose logits are wanted.
            logits: where to write them: contiguous fp32 ``[rows, vocab]``; by default a new one.
            states: also return every new token's state.

        Returns:
            fp32 logits ``[rows, vocab]`` or None, and fp32 states after the final norm
            ``[tokens, hidden]`` or None.

        Raises:
            QuantkitError: an argument is out of range (a page, an id, a position), or memory
                ran out; nothing was computed.
            ValueError: ``logits`` is something else.
        """
        rows = 0 if logit_rows is None else len(logit_rows)
        if rows and logits is None:
            logits = torch.empty(rows, self.shape.vocab, dtype=torch.float32)
        if rows and logits is not None:
            _check_floats("logits", logits, (rows, self.shape.vocab))
        kept = torch.empty(len(tokens), self.shape.hidden, dtype=torch.float32) if states else None
        batch = self._batch
        batch.sequences = len(past)
        batch.tokens = tokens.buffer_info()[0]
        batch.starts = starts.buffer_info()[0]
        batch.past = past.buffer_info()[0]
        batch.pages = pages.buffer_info()[0]
        batch.page_stride = page_stride
        batch.kv = store.pointer
        batch.logit_rows = None if logit_rows is None else logit_rows.buffer_info()[0]
        batch.logit_count = rows
        batch.logits = logits.data_ptr() if rows and logits is not None else None
        batch.states = None if kept is None else kept.data_ptr()
        self._follow_torch_threads()
        self._check(self._forward(self._handle, self._batch_pointer), "a forward pass")
        return logits, kept

    def head(self, states: Tensor) -> Tensor:
        """fp32 logits ``[rows, vocab]`` of fp32 states ``[rows, hidden]``."""
        states = states.contiguous()
        _check_floats("states", states, (len(states), self.shape.hidden))
        logits = torch.empty(len(states), self.shape.vocab, dtype=torch.float32)
        self._follow_torch_threads()
        status = self._library.qk_decoder_head(
            self._handle,
            _pointer(states.data_ptr()),
            _i64(len(states)),
            _pointer(logits.data_ptr()),
        )
        self._check(status, "the output projection")
        return logits

    def times(self) -> dict[str, float]:
        """Seconds of the last forward pass by part, and "lifetime": of all passes."""
        values = (_i64 * len(PARTS))()
        self._library.qk_decoder_times(self._handle, values)
        return {part: value * 1e-9 for part, value in zip(PARTS, values, strict=True)}

    def new_cache(self, pages: int, dtype: str = "auto") -> PageStore:
        """An empty store of so many pages: ``auto`` rounds by the model's own scales, if it has
        some; a named 8-bit type gives each token its own."""
        own = self.cache_scales if dtype == "auto" else None
        dtype = self._kv_dtype(dtype)
        page_bytes = self._page_bytes(dtype)
        fixed = None if own is None else own.fixed
        return PageStore(self.layers, pages, self.shape.kv_heads, page_bytes, dtype, fixed)

    def token_nbytes(self, dtype: str = "auto") -> int:
        """Bytes of one token's keys and values over all layers."""
        dtype = self._kv_dtype(dtype)
        each = self._page_bytes(dtype) // PAGE_TOKENS + (4 if dtype in ("int8", "fp8") else 0)
        return 2 * self.layers * self.shape.kv_heads * each

    def _kv_dtype(self, dtype: str) -> str:
        if dtype == "auto" and self.cache_scales is not None:
            return self.cache_scales.dtype
        if dtype == "auto":
            return "fp32" if self.precision == "fp32" else "bf16"
        return dtype

    def _page_bytes(self, dtype: str) -> int:
        head_dim = _i64(self.shape.head_dim)
        return int(self._library.qk_kv_page_bytes(_i32(KV_DTYPES[dtype]), head_dim))

    def _follow_torch_threads(self) -> None:
        self._library.qk_set_default_threads(_i32(torch.get_num_threads()))

    def _check(self, status: int, what: str) -> None:
        if status != 0:
            reason = self._library.qk_status_message(_i32(status)).decode()
            raise QuantkitError(f"the native decoder refuses {what}: {reason}")

    def _data(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        if tensor.device.type != "cpu":
            raise ValueError(f"a tensor is on {tensor.device}; the native decoder runs on the CPU")
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _floats(self, tensor: Tensor | None) -> int | None:
        return None if tensor is None else self._data(tensor.detach().float().contiguous())

    def _linear(self, linear: Linear) -> _CLinear:
        scale, zero = linear.scale, linear.zero
        for table in (scale, zero):
            if table is not None and (table.shape[0] != linear.n or table.stride(0) != 1):
                raise ValueError("scales and zeros must come from quantkit.ops.pack_scale")
        if zero is not None and zero.stride() != scale.stride():
            raise ValueError("zeros must lie as the scales do")
        return _CLinear(
            format=FORMATS[linear.format],
            activation=ACTIVATIONS[linear.activation],
            n=linear.n,
            k=linear.k,
            group_size=linear.group_size,
            act_group=linear.act_group,
            act_scale=linear.act_scale,
            scale_dtype=_DTYPES[scale.dtype],
            packed=self._data(linear.packed),
            lut=self._floats(linear.lut),
            scale=self._data(scale),
            scale_stride=linear.n,
            zero=self._data(zero),
            bias=self._floats(linear.bias),
        )

    def _projection(self, parts: tuple[Linear, ...]) -> _CProjection:
        array = (_CLinear * len(parts))(*(self._linear(part) for part in parts))
        self._kept.append(array)
        return _CProjection(parts=array, count=len(parts))

    def _layer(self, layer: Layer) -> _CLayer:
        return _CLayer(
            attention_norm=self._floats(layer.attention_norm),
            qkv=self._projection(layer.qkv),
            q_norm=self._floats(layer.q_norm),
            k_norm=self._floats(layer.k_norm),
            attention_out=self._projection(layer.attention_out),
            post_attention_norm=self._floats(layer.post_attention_norm),
            mlp_norm=self._floats(layer.mlp_norm),
            gate_up=self._projection(layer.gate_up),
            down=self._projection(layer.down),
            post_mlp_norm=self._floats(layer.post_mlp_norm),
            rope_cos=self._floats(layer.rope_cos),
            rope_sin=self._floats(layer.rope_sin),
            window=layer.window,
        )


def _check_floats(name: str, tensor: Tensor, shape: tuple[int, int]) -> None:
    """What native code reads or writes by its address alone."""
    fits = tensor.dtype == torch.float32 and tensor.is_cpu and tensor.is_contiguous()
    if not fits or tensor.shape != shape:
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, must be contiguous "
            f"fp32 {list(shape)} on the CPU"
        )
