"""One thing after the other, and none of them outlives the process."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from quantkit.serve.daemon_executor import DaemonExecutor

EXECUTOR_HANGS = """
import threading
from quantkit.serve.daemon_executor import DaemonExecutor

begun = threading.Event()
DaemonExecutor("hung").submit(lambda: (begun.set(), threading.Event().wait()))
assert begun.wait(60)
"""

TOKENIZER_HANGS = """
import asyncio, threading
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from quantkit.serve.api.prompts import PromptEncoder

begun = threading.Event()

class Hung(PreTrainedTokenizerFast):
    def encode(self, *arguments, **options):
        begun.set()
        threading.Event().wait()

async def ask():
    encoder = PromptEncoder(Hung(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))))
    asked = asyncio.create_task(encoder.text("a"))
    assert await asyncio.to_thread(begun.wait, 60)
    asked.cancel()

asyncio.run(ask())
"""


@pytest.mark.parametrize("code", [EXECUTOR_HANGS, TOKENIZER_HANGS], ids=["work", "tokenizer"])
def test_what_hangs_does_not_keep_the_process_alive(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_work_is_done_in_order_by_one_thread_at_a_time() -> None:
    executor, done, go_on = DaemonExecutor("quantkit-test"), [], threading.Event()

    def work(i: int) -> int:
        assert go_on.wait(20)
        done.append((i, threading.current_thread().name))
        return i * i

    futures = [executor.submit(lambda i=i: work(i)) for i in range(9)]
    assert futures[5].cancel()
    go_on.set()
    assert [future.result(20) for future in futures[:5]] == [0, 1, 4, 9, 16]
    assert futures[8].result(20) == 64
    assert done == [(i, "quantkit-test") for i in range(9) if i != 5]
    # Its thread has perhaps ended by now: another one takes over.
    assert executor.submit(lambda: work(9)).result(20) == 81


def test_what_fails_says_so_and_the_next_goes_on() -> None:
    def broken() -> None:
        raise RuntimeError("it cannot be done")

    executor = DaemonExecutor("quantkit-test")
    first, second = executor.submit(broken), executor.submit(lambda: 2)
    with pytest.raises(RuntimeError, match="it cannot be done"):
        first.result(20)
    assert second.result(20) == 2
