"""One forward pass that computes logits only where somebody asked for them.

At a 49k vocabulary the output projection of a small model costs as much as its layers, and
a softmax over every position of a batch costs memory in proportion. Most causal models are
``head(base(tokens))``; where that holds (a probe at construction decides) the two halves run
apart, so that a caller can project only the positions it scores. Where it does not hold
(logit scaling, soft caps, unknown classes), the full logits stand in for the hidden states
and the head is the identity: slower, never wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantkit import model as models
from quantkit.evals.token_tree import Chain, TreeRow
from quantkit.models.decoder import Decoder
from quantkit.models.paged import PagedRunner, PagedSequence, Work, pages_for
from quantkit.models.runtime import Runtime
from quantkit.ops.page_store import PAGE_TOKENS

#: Architectures in which a token attends exactly where a 4-D mask says, at the position it is
#: given: rotary (or no) positions, full attention, no recurrent state. They are scored as
#: token trees; a test runs each of them against the plain path.
TREE_ARCHITECTURES = (
    "gemma",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)

#: Nodes of a packed row, or padded tokens of a plain batch, of transformers' modules on each kind
#: of device. A CPU's matrix products are efficient from about 200 rows on, and a longer row pays
#: attention over pairs that the mask discards; a GPU wants thousands.
MODULE_BUDGETS = {"cpu": 256, "cuda": 4096}

#: The same of the native decoder, which attends to nothing in vain: enough for the short levels of
#: a tree, choices behind their contexts, to be worth reading all weights once more.
DECODER_BUDGET = 1024

#: fp32 elements of one chunk of logits: 32 MB, about 170 positions at a 49k vocabulary.
CHUNK_ELEMENTS = 1 << 23


class Forward(Protocol):
    """A causal language model, split into hidden states and logits.

    Attributes:
        budget: nodes of a packed row, or padded tokens of a plain batch, that it is fast with.
        device: where tokens, states and logits are.
        tree: `tree_states` works.
        vocab_size: width of the logits.
    """

    budget: int
    device: torch.device
    tree: bool

    @property
    def vocab_size(self) -> int: ...

    def states(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """What `logits` needs to know about each position.

        Args:
            tokens: ids ``[batch, length]``.
            mask: ``[batch, length]`` of 0/1, padding on the right; all 1 when None.

        Returns:
            ``[batch, length, width]``.
        """
        ...

    def tree_states(self, row: TreeRow) -> Tensor:
        """The same ``[nodes, width]`` for the nodes of a row of packed sequences."""
        ...

    def logits(self, states: Tensor) -> Tensor:
        """fp32 logits ``[n, vocab]`` of states ``[n, width]``."""
        ...


def make_forward(runtime: Runtime) -> Forward:
    """The native decoder's forward pass, or transformers' modules'.

    Raises:
        UsageError: the model predicts no next tokens.
    """
    models.require_logits(runtime.model.config, "quantkit eval scores")
    if runtime.decoder is not None:
        return DecoderForward(runtime.decoder)
    return ModuleForward(runtime.model)


def logit_chunks(forward: Forward, states: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yields (first row, fp32 logits ``[rows, vocab]``) over states ``[n, width]``."""
    rows = chunk_rows(forward.vocab_size)
    for first in range(0, len(states), rows):
        yield first, forward.logits(states[first : first + rows])


class DecoderForward:
    """The native decoder. Sequences of a tree share the pages of their common prefix."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.budget = DECODER_BUDGET
        self.device = torch.device("cpu")
        self.tree = True
        self._runner: PagedRunner | None = None

    @property
    def vocab_size(self) -> int:
        return self.decoder.shape.vocab

    def states(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        lengths = [tokens.shape[1]] * len(tokens) if mask is None else mask.sum(1).tolist()
        ids = [row[: int(n)] for row, n in zip(tokens.tolist(), lengths, strict=True)]
        runner = self._with_pages(sum(pages_for(len(row)) for row in ids))
        sequences = [PagedSequence() for _ in ids]
        found = runner.states([Work(s, row) for s, row in zip(sequences, ids, strict=True)])
        for sequence in sequences:
            runner.release(sequence)
        return torch.nn.utils.rnn.pad_sequence(found, batch_first=True)

    def tree_states(self, row: TreeRow) -> Tensor:
        chains = row.chains()
        # The last child of a chain goes on in its pages; the others fork, which copies a page.
        heirs = {c.parent: i for i, c in enumerate(chains) if c.parent is not None}
        runner = self._with_pages(_pages_needed(row, chains, heirs))
        out = torch.empty(len(row.tokens), self.decoder.shape.hidden, dtype=torch.float32)
        sequences: dict[int, PagedSequence] = {}
        level = [i for i, chain in enumerate(chains) if chain.parent is None]
        while level:
            for i in level:
                parent = chains[i].parent
                if parent is None:
                    sequences[i] = PagedSequence()
                elif heirs[parent] == i:
                    sequences[i] = sequences.pop(parent)
                else:
                    sequences[i] = runner.fork(sequences[parent])
            spans = [(chains[i].start, chains[i].end) for i in level]
            works = [
                Work(sequences[i], row.tokens[start:end])
                for i, (start, end) in zip(level, spans, strict=True)
            ]
            for (start, end), states in zip(spans, runner.states(works), strict=True):
                out[start:end] = states
            here = set(level)
            level = [i for i, chain in enumerate(chains) if chain.parent in here]
        for sequence in sequences.values():
            runner.release(sequence)
        return out

    def logits(self, states: Tensor) -> Tensor:
        return self.decoder.head(states)

    def _with_pages(self, pages: int) -> PagedRunner:
        """A runner with so many pages, all of them free; the last one if it is large enough."""
        if self._runner is None or self._runner.free_pages < pages:
            self._runner = PagedRunner(self.decoder, pages)
        return self._runner


def _pages_needed(row: TreeRow, chains: Sequence[Chain], heirs: Mapping[int, int]) -> int:
    """Pages that the chains of a row fill together, each chain's copy of a shared one counted."""
    pages = 0
    for i, chain in enumerate(chains):
        first, end = row.positions[chain.start], row.positions[chain.end - 1] + 1
        takes_over = chain.parent is not None and heirs[chain.parent] == i
        pages += pages_for(end) - (pages_for(first) if takes_over else first // PAGE_TOKENS)
    return pages


class ModuleForward:
    """A transformers model.

    Attributes:
        budget, device: see `Forward`.
        tree: the model takes 4-D masks and explicit positions (see `TREE_ARCHITECTURES`).
        split: hidden states and output projection run apart.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device: torch.device = model.device
        self.budget = MODULE_BUDGETS.get(self.device.type, MODULE_BUDGETS["cuda"])
        self.dtype: torch.dtype = model.dtype
        self.tree = _takes_trees(model.config)
        self._base, self._head = _halves(model)
        self.split = self._base is not None

    @torch.inference_mode()
    def states(
        self, tokens: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """As `Forward.states`; with ``positions`` the mask may be boolean
        ``[batch, 1, length, length]``, True where row attends to column.

        Returns:
            ``[batch, length, width]``, the model's dtype: final hidden states, or logits when
            the model cannot be split.
        """
        if mask is not None and mask.ndim == 4:
            # Additive, because eager attention adds it and sdpa takes either form.
            # exp(min - max) is exactly 0, and unlike -inf it cannot make a NaN.
            additive = torch.zeros(mask.shape, dtype=self.dtype, device=self.device)
            mask = additive.masked_fill_(~mask, torch.finfo(self.dtype).min)
        run = self._base if self._base is not None else self.model
        out = run(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
        states: Tensor = out.last_hidden_state if self._base is not None else out.logits
        return states

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """fp32 logits ``[n, vocab]`` of states ``[n, width]``."""
        out: Tensor = self._head(states) if self._head is not None else states
        return out.float()

    def tree_states(self, row: TreeRow) -> Tensor:
        tokens = torch.tensor([row.tokens], device=self.device)
        if not row.branches:
            return self.states(tokens)[0]
        mask = torch.from_numpy(row.mask())[None, None].to(self.device)
        positions = torch.tensor([row.positions], device=self.device)
        return self.states(tokens, mask=mask, positions=positions)[0]

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        text = getattr(self.model.config, "text_config", None) or self.model.config
        return int(text.vocab_size)


def chunk_rows(vocab_size: int) -> int:
    """Positions whose logits are held at once."""
    return max(16, CHUNK_ELEMENTS // vocab_size)


def _takes_trees(config: Any) -> bool:
    """Whether a model of this config honours a 4-D mask (see `TREE_ARCHITECTURES`)."""
    full = all(t == "full_attention" for t in getattr(config, "layer_types", None) or ())
    return (
        config.model_type in TREE_ARCHITECTURES
        and config._attn_implementation in ("sdpa", "eager")
        # A custom mask replaces the sliding window's, so a window must not be there.
        and not getattr(config, "sliding_window", None)
        and full
    )


@torch.inference_mode()
def _halves(model: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """(base, head) if ``head(base(tokens))`` is what the model computes, else (None, None)."""
    base = getattr(model, model.base_model_prefix, None)
    head = model.get_output_embeddings()
    if base is None or base is model or head is None:
        return None, None
    probe = torch.tensor([[0, 1, 2]], device=model.device)
    try:
        whole = model(input_ids=probe, use_cache=False).logits
        halves = head(base(input_ids=probe, use_cache=False).last_hidden_state)
    except (AttributeError, TypeError, RuntimeError):
        return None, None
    if whole.shape != halves.shape or not torch.allclose(whole, halves, equal_nan=True):
        return None, None
    return base, head
