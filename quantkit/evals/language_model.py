"""The bridge between lm-eval's tasks and a loaded model.

`QuantkitLM` answers lm-eval's three kinds of request, which `quantkit.evals.token_model` turns
into token ids as lm-eval's own ``--model hf`` does, so in fp32 the scores are the same to
rounding. Two things differ, on purpose: scores are summed from an fp32 softmax even when the
model is bf16, and a prefix that several requests share is computed once (see
`quantkit.evals.token_tree`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from lm_eval.models.utils import postprocess_generated_text, resolve_max_length
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.evals.forward import logit_chunks, make_forward
from quantkit.evals.greedy import make_greedy
from quantkit.evals.token_model import Pair, TokenLM
from quantkit.evals.token_tree import pack
from quantkit.models.runtime import Runtime
from quantkit.progress import Progress, silent


class QuantkitLM(TokenLM):
    """A `Runtime` that lm-eval can ask.

    Args:
        runtime: the model, its tokenizer and what identifies them.
        progress: told of finished requests as (done, total, ``label``).
        tree: pack shared prefixes; None decides by the model's architecture.
        budget: nodes of a packed row or tokens of a batch; None for what the forward pass is fast
            with.
    """

    remedy = "the weights or the kernels are broken; try --kernels reference"

    def __init__(
        self,
        runtime: Runtime,
        *,
        progress: Progress = silent,
        tree: bool | None = None,
        budget: int | None = None,
    ) -> None:
        limit = resolve_max_length(runtime.model.config, runtime.tokenizer)
        super().__init__(runtime.tokenizer, limit, progress=progress)
        self.forward = make_forward(runtime)
        self._runtime = runtime
        self._device = self.forward.device
        self._tree = self.forward.tree if tree is None else tree
        self._budget = budget or self.forward.budget

    def continue_greedily(
        self, prompts: Sequence[list[int]], stops: Sequence[list[str]], limits: Sequence[int]
    ) -> list[str]:
        """See `TokenLM.continue_greedily`."""
        greedy = make_greedy(self._runtime, self._runtime.eos_ids, pads=self._tree)

        texts = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))
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

    def entropy_share(self, ids: list[int]) -> float:
        """See `TokenLM.entropy_share`; exact, in fp32."""
        states = self.forward.states(torch.tensor([ids], device=self.device))[0, -1:]
        logits = self.forward.logits(states)[0]
        log_p = logits.log_softmax(-1)
        if not torch.isfinite(logits).all():
            raise QuantkitError("canary 'finite': the logits hold NaN or infinity")
        return float(-(log_p.exp() * log_p).sum()) / math.log(len(log_p))

    # --- scoring ---------------------------------------------------------------------------

    def score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """See `TokenLM.score`."""
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
