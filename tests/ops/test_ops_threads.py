"""The thread pool: results do not depend on it, and it survives what programs do to threads."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from ops_cases import random_layer, same_bits

from quantkit import ops
from quantkit.errors import UsageError


def test_thread_count_follows_torch_until_it_is_set() -> None:
    before = torch.get_num_threads()
    ops.set_num_threads(0)
    try:
        torch.set_num_threads(1)
        assert ops.get_num_threads() == 1
        ops.set_num_threads(3)
        assert ops.get_num_threads() == 3
        ops.set_num_threads(0)
        assert ops.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    with pytest.raises(UsageError, match="num_threads -1 is negative"):
        ops.set_num_threads(-1)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    layer = random_layer("int4", 333, 320, 64, zero=True)
    for m in (1, 5, 70, 500):
        x = torch.randn(m, 320).bfloat16()
        ops.set_num_threads(1)
        expected = layer(x)
        for threads in (2, 3, 7):
            ops.set_num_threads(threads)
            assert same_bits(layer(x), expected)


def test_torchs_threads_give_the_same_bits() -> None:
    torch.manual_seed(3)
    layer = random_layer("int4", 333, 320, 64, zero=True)
    inputs = [torch.randn(m, 320).bfloat16() for m in (1, 5, 300)]
    expected = [layer(x) for x in inputs]
    ops.set_thread_pool("torch")
    assert ops.get_thread_pool() == "torch"
    for torch_threads in (1, 2):
        torch.set_num_threads(torch_threads)
        for threads in (0, 2, 5):
            ops.set_num_threads(threads)
            assert all(same_bits(layer(x), y) for x, y in zip(inputs, expected, strict=True))
    with pytest.raises(UsageError, match="thread pool 'omp' is unknown; use 'own' or 'torch'"):
        ops.set_thread_pool("omp")


def test_fifty_reruns_have_the_same_bits() -> None:
    torch.manual_seed(1)
    layer = random_layer("fp8", 200, 256, 64)
    ops.set_num_threads(4)
    x = torch.randn(3, 256).bfloat16()
    expected = layer(x)
    assert all(same_bits(layer(x), expected) for _ in range(50))


def test_calls_from_several_python_threads() -> None:
    torch.manual_seed(2)
    ops.set_num_threads(2)
    layer = random_layer("int8", 150, 200, -1)
    inputs = [torch.randn(4, 200) for _ in range(4)]
    expected = [layer(x) for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(40):
            if not same_bits(layer(inputs[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_starts_its_own_pool() -> None:
    ops.set_num_threads(2)
    layer = random_layer("int4", 300, 128, 64)
    x = torch.randn(2, 128)
    expected = layer(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if same_bits(layer(x), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
