"""lm-eval without what it prints."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from tqdm import tqdm


@contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's progress bar and notices off the terminal while it runs."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with mock.patch("lm_eval.api.task.tqdm", functools.partial(tqdm, disable=True)):
            yield
    finally:
        logger.setLevel(level)
