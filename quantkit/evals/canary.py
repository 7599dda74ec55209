"""Checks that a model's probabilities mean anything, before a suite spends time on them.

A broken export or kernel often yields finite numbers that say nothing: every choice then
scores chance, and a comparison of two such models passes. A trained model prefers English to
the same words shuffled, whatever it was trained for.
"""

from __future__ import annotations

from quantkit.errors import QuantkitError
from quantkit.evals.token_model import TokenLM

#: (natural, the same words shuffled).
SENTENCES = (
    (
        "The children walked home from school because the bus was late.",
        "late school bus because from walked the was The home children.",
    ),
    (
        "Please send me a copy of the invoice before the end of the month.",
        "month of the send copy before me the invoice of end Please a the.",
    ),
    (
        "Water boils at a lower temperature in the mountains than at the sea.",
        "temperature than the at in sea Water at lower the mountains a boils.",
    ),
)

#: A next-token distribution this close to the uniform one's entropy carries no information.
UNIFORM_SHARE = 0.995


def check_canaries(lm: TokenLM) -> None:
    """Refuse a model whose log-probabilities are at chance.

    Raises:
        QuantkitError: names the canary that failed.
    """
    for natural, shuffled in SENTENCES:
        pairs = []
        for text in (natural, shuffled):
            ids = lm.tok_encode(text, add_special_tokens=False)
            pairs.append(([lm.prefix_token_id], ids))
        share = lm.entropy_share([lm.prefix_token_id, *pairs[0][1]])
        if share > UNIFORM_SHARE:
            raise QuantkitError(
                f"canary 'uniform': after {natural!r} the next token's entropy is {share:.1%} of "
                "its maximum, so the model knows nothing",
                remedy=lm.remedy,
            )
        (likely, _), (unlikely, _) = lm.score(pairs)
        if not likely > unlikely:
            raise QuantkitError(
                f"canary 'shuffled words': {natural!r} is no more likely ({likely:.1f} nats) than "
                f"its words in disorder ({unlikely:.1f})",
                remedy=lm.remedy,
            )
