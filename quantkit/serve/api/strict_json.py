"""JSON that any reader takes, of what clients and models bring."""

from __future__ import annotations

import json


def strict_json(value: object) -> str:
    """``value`` as JSON that a body in UTF-8 can carry.

    Raises:
        ValueError: it holds NaN, an infinity or half a surrogate pair, all of which Python's parser
            lets in, or is nested too deeply.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, RecursionError) as error:
        raise ValueError("nested too deeply, or holds NaN or half a surrogate pair") from error
    return text
