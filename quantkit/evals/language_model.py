"""The bridge between lm-eval's tasks and a loaded model.

`QuantkitLM` answers lm-eval's three kinds of request. Text is split into tokens exactly as
lm-eval's own ``--model hf`` does (its `TemplateLM` is the base class), so in fp32 the scores
are the same to rounding. Two things differ, on purpose: scores are summed from an fp32
softmax even when the model is bf16, and a prefix that several requests share is computed
once (see `quantkit.evals.token_tree`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.evals.forward import logit_chunks, make_forward
from quantkit.evals.greedy import make_greedy
from quantkit.evals.token_tree import pack
from quantkit.models.runtime import Runtime
from quantkit.progress import Progress, silent

#: Nodes of a packed row, or padded tokens of a plain batch, for each kind of device. A CPU's
#: matrix products are efficient from about 200 rows on; a GPU wants thousands.
BUDGETS = {"cpu": 256, "cuda": 4096}

#: Tokens written when a task does not say (lm-eval's own default).
MAX_GEN_TOKENS = 256

#: (context ids, continuation ids): what is given and what is scored.
Pair = tuple[list[int], list[int]]


class QuantkitLM(TemplateLM):
    """A `Runtime` that lm-eval can ask.

    Args:
        runtime: the model, its tokenizer and what identifies them.
        progress: told of finished requests as (done, total, ``label``).
        tree: pack shared prefixes; None decides by the model's architecture.
        budget: see `BUDGETS`.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        progress: Progress = silent,
        tree: bool | None = None,
        budget: int | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer: Any = runtime.tokenizer
        self.forward = make_forward(runtime)
        self._runtime = runtime
        self.progress = progress
        self.label = ""
        self._device = self.forward.device
        self._tree = self.forward.tree if tree is None else tree
        self._budget = budget or BUDGETS.get(self._device.type, BUDGETS["cuda"])
        self._max_length = resolve_max_length(runtime.model.config, self.tokenizer)
        self._encoded: dict[str, list[int]] = {}

    # --- what lm-eval's base class asks for ------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text that has no context: BOS, or EOS where there is none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """Longest input, in tokens."""
        return self._max_length

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; the tokenizer's own special tokens unless the text already has them."""
        if add_special_tokens is None and has_bos_prefix(
            string, self.tokenizer.decode(self.prefix_token_id)
        ):
            add_special_tokens = False
        # An item's context is encoded once for each of its choices.
        key = f"{add_special_tokens}:{string}"
        if key not in self._encoded:
            extra = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            self._encoded[key] = self.tokenizer.encode(string, verbose=False, **extra)
        return self._encoded[key]

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    # --- the three kinds of request --------------------------------------------------------

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is the greedy one) per request."""
        try:
            return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._encoded.clear()

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        for (context, continuation), _ids, scored in requests:
            if not scored:
                raise QuantkitError(
                    f"{self.label}: continuation {continuation!r} has no token of its own after "
                    f"{context[-40:]!r}",
                    remedy="check target_delimiter and the choices",
                )
            if len(scored) > self.max_length:
                raise QuantkitError(
                    f"{self.label}: continuation {continuation[:40]!r}… has {len(scored)} tokens, "
                    f"more than the model's {self.max_length}"
                )
        return self.score([(context, scored) for _, context, scored in requests])

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Log-probability of each whole text, in windows of `max_length` tokens."""
        windows: list[Pair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append(make_disjoint_window(window))
                owners.append(owner)
        self._encoded.clear()
        totals = [0.0] * len(requests)
        for owner, (value, _greedy) in zip(owners, self.score(windows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy text up to the first stop string, the end of sequence or ``max_gen_toks``."""
        config = self._runtime.model.generation_config
        ends = (
            config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        )
        stop_ids = frozenset(int(i) for i in (*ends, self.tokenizer.eos_token_id) if i is not None)
        greedy = make_greedy(self._runtime, stop_ids, pads=self._tree)

        eos = self.tokenizer.decode(self.eot_token_id)
        prompts, stops, limits = [], [], []
        for request in requests:
            context, options = request.args
            options = normalize_gen_kwargs(options, MAX_GEN_TOKENS)
            if options["do_sample"]:
                raise QuantkitError(f"{self.label}: do_sample is set; suites are scored greedily")
            room = self.max_length - options["max_gen_toks"]
            if room <= 0:
                raise QuantkitError(
                    f"{self.label}: max_gen_toks {options['max_gen_toks']} leaves no room for a "
                    f"prompt in {self.max_length} tokens"
                )
            prompts.append((self.tok_encode(context) or [self.prefix_token_id])[-room:])
            stops.append([s for s in handle_stop_sequences(options["until"], eos) if s])
            limits.append(options["max_gen_toks"])
        self._encoded.clear()

        texts = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (-len(prompts[i]), prompts[i]))
        for first in range(0, len(order), greedy.batch):
            batch = order[first : first + greedy.batch]

            def finished(slot: int, written: list[int], batch: list[int] = batch) -> bool:
                text = self.tok_decode(written)
                return any(stop in text for stop in stops[batch[slot]])

            answers = greedy([prompts[i] for i in batch], [limits[i] for i in batch], finished)
            for i, written in zip(batch, answers, strict=True):
                texts[i] = postprocess_generated_text(self.tok_decode(written), stops[i], None)
            self.progress(min(first + greedy.batch, len(order)), len(order), self.label)
        return texts

    # --- scoring ---------------------------------------------------------------------------

    def score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Score continuations given contexts, all as token ids.

        Pairs longer than the model takes lose tokens on the left. The answers come in the
        order of the pairs and do not depend on it.
        """
        # One-token choices of an item have the same input: the context.
        owners: dict[tuple[int, ...], list[int]] = {}
        for i, (context, scored) in enumerate(pairs):
            owners.setdefault(tuple((context + scored)[-(self.max_length + 1) : -1]), []).append(i)
        inputs = [list(tokens) for tokens in owners]
        pairs_of = list(owners.values())

        results: list[tuple[float, bool]] = [(math.nan, False)] * len(pairs)
        done = 0
        for batch, states, nodes in self._batches(inputs):
            members = [i for b in batch for i in pairs_of[b]]
            paths = [path for b, path in zip(batch, nodes, strict=True) for _ in pairs_of[b]]
            wanted = [pairs[i][1] for i in members]
            # The last token's state predicts nothing that is asked; the first scored token
            # is predicted by the state of the token before it. Both are gone by here.
            ends = [path[-len(scored) :] for path, scored in zip(paths, wanted, strict=True)]
            values, greedy = self._token_scores(states, ends, wanted)
            for i, value, is_greedy in zip(members, values, greedy, strict=True):
                results[i] = (value, is_greedy)
            done += len(members)
            self.progress(done, len(pairs), self.label)
        return results

    def _batches(
        self, inputs: list[list[int]]
    ) -> Iterator[tuple[list[int], Tensor, list[list[int]]]]:
        """Yields (indices of the inputs, states ``[n, width]``, each input's rows of states)."""
        if self._tree:
            for row in pack(inputs, self._budget):
                states = self.forward.tree_states(row)
                yield [i for i, _ in row.paths], states, [path for _, path in row.paths]
            return
        for members in _length_batches(inputs, self._budget):
            longest = max(len(inputs[i]) for i in members)
            # Padding on the right: causal attention never lets a scored position see it.
            tokens = torch.zeros(len(members), longest, dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for slot, i in enumerate(members):
                tokens[slot, : len(inputs[i])] = torch.tensor(inputs[i])
                mask[slot, : len(inputs[i])] = 1
            states = self.forward.states(tokens.to(self._device), mask=mask.to(self._device))
            nodes = [
                list(range(slot * longest, slot * longest + len(inputs[i])))
                for slot, i in enumerate(members)
            ]
            yield members, states.flatten(0, 1), nodes

    def _token_scores(
        self, states: Tensor, nodes: list[list[int]], tokens: list[list[int]]
    ) -> tuple[list[float], list[bool]]:
        """Sum of log-probabilities and greediness of each continuation.

        Args:
            states: ``[n, width]``.
            nodes: rows of ``states`` that predict each continuation's tokens.
            tokens: the continuations.
        """
        # Choices that share a prefix share the positions that predict it: project those once.
        unique = sorted({node for path in nodes for node in path})
        slot_of = {node: slot for slot, node in enumerate(unique)}
        owner = [k for k, path in enumerate(nodes) for _ in path]
        slots = torch.tensor([slot_of[node] for path in nodes for node in path])
        targets = torch.tensor([t for continuation in tokens for t in continuation])

        values = torch.empty(len(owner), dtype=torch.float64)
        best = torch.empty(len(owner), dtype=torch.bool)
        picked = states[torch.tensor(unique, device=states.device)]
        for first, logits in logit_chunks(self.forward, picked):
            normalizer = logits.logsumexp(-1)
            if not torch.isfinite(normalizer).all():
                raise QuantkitError(f"{self.label}: the logits hold NaN or infinity")
            here = (slots >= first) & (slots < first + len(logits))
            rows = (slots[here] - first).to(logits.device)
            wanted = targets[here].to(logits.device)
            values[here] = (logits[rows, wanted] - normalizer[rows]).double().cpu()
            best[here] = (logits.argmax(-1)[rows] == wanted).cpu()

        sums = [0.0] * len(nodes)
        greedy = [True] * len(nodes)
        for k, value, is_best in zip(owner, values.tolist(), best.tolist(), strict=True):
            sums[k] += value
            greedy[k] = greedy[k] and is_best
        return sums, greedy


def _length_batches(inputs: list[list[int]], budget: int) -> list[list[int]]:
    """Indices in batches of at most ``budget`` padded tokens, longest first."""
    batches: list[list[int]] = []
    for i in sorted(range(len(inputs)), key=lambda i: (-len(inputs[i]), inputs[i], i)):
        if not batches or (len(batches[-1]) + 1) * len(inputs[batches[-1][0]]) > budget:
            batches.append([])
        batches[-1].append(i)
    return batches
