"""lm-eval's three kinds of request as token ids, whoever computes: a loaded model or a server.

Text is split into tokens exactly as lm-eval's own ``--model hf`` does (its `TemplateLM` is the
base class), so two engines that run the same weights are asked the same questions.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from quantkit.errors import QuantkitError
from quantkit.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Tokens written when a task does not say (lm-eval's own default).
MAX_GEN_TOKENS = 256

#: (context ids, continuation ids): what is given and what is scored.
Pair = tuple[list[int], list[int]]


class TokenLM(TemplateLM):
    """A language model that lm-eval can ask, reduced to scoring and continuing token ids.

    Args:
        tokenizer: of the model that answers.
        max_length: longest input of the model, in tokens.
        progress: told of finished requests as (done, total, ``label``).
    """

    #: What to try when the model's probabilities mean nothing.
    remedy = ""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, *, progress: Progress = silent
    ) -> None:
        super().__init__()
        self.tokenizer: Any = tokenizer
        self.progress = progress
        self.label = ""
        self._max_length = max_length
        self._encoded: dict[str, list[int]] = {}

    # --- what an engine does ---------------------------------------------------------------

    @abc.abstractmethod
    def score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether it is the greedy one) of each continuation.

        Pairs of more than ``max_length + 1`` tokens lose tokens on the left. The answers come
        in the order of the pairs and do not depend on it.
        """

    @abc.abstractmethod
    def continue_greedily(
        self, prompts: Sequence[list[int]], stops: Sequence[list[str]], limits: Sequence[int]
    ) -> list[str]:
        """Greedy text after each prompt, cut at the first of its stop strings.

        Args:
            prompts: token ids, none empty.
            stops: strings that end each text.
            limits: most tokens to write for each.
        """

    @abc.abstractmethod
    def entropy_share(self, ids: list[int]) -> float:
        """Entropy of the token after ``ids`` as a share of the uniform distribution's.

        1 is a model that knows nothing. An engine that cannot compute it gives a lower bound.
        """

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
        return self.continue_greedily(prompts, stops, limits)
