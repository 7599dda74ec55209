"""Timing on a GPU: CUDA graphs in turns, and each one's share of what a copy reaches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

#: name -> (bytes that one call must move, one call for each set of buffers)
Contenders = dict[str, tuple[int, list[Callable[[], object]]]]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 2 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source), 1) for _ in range(20)]
    return 2 * source.numel() / (sorted(times)[10] * 1e-3)


def milliseconds(run: Callable[[], object], count: int) -> float:
    """Of one of ``count`` equal parts of run."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def captured(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


class Table:
    """Rows of medians, printed as they come."""

    def __init__(self) -> None:
        self.gpu = torch.cuda.get_device_properties(0)
        self.roof = copy_bandwidth()
        self.rows: list[dict] = []
        l2 = self.gpu.L2_cache_size / 2**20
        print(f"{self.gpu.name}, copy {self.roof / 1e12:.2f} TB/s, L2 {l2:.0f} MiB")
        print(f"{'case':24} {'kernel':24} {'median':>9} {'p10':>8} {'p90':>8}  of copy")

    def copies(self, size: int) -> int:
        """Buffers of this size that exceed twice the L2 cache, four at least."""
        return max(4, -(-2 * self.gpu.L2_cache_size // size) + 1)

    def race(self, case: dict[str, str | int], contenders: Contenders, rounds: int = 25) -> None:
        """Graphs of all contenders in turns; the first three rounds warm up."""
        graphs = {
            who: (size, len(calls), captured(calls)) for who, (size, calls) in contenders.items()
        }
        times: dict[str, list[float]] = {who: [] for who in graphs}
        for _ in range(rounds):
            for who, (_, count, graph) in graphs.items():
                times[who].append(milliseconds(graph.replay, count) * 1e3)
        label = " ".join(str(v) for v in case.values())
        for who, (size, _, _) in graphs.items():
            ordered = sorted(times[who][3:])
            median, low, high = (ordered[int(q * (len(ordered) - 1))] for q in (0.5, 0.1, 0.9))
            share = size / (median * 1e-6) / self.roof
            print(f"{label:24} {who:24} {median:7.2f}us {low:8.2f} {high:8.2f} {share:7.1%}")
            row = {**case, "kernel": who, "share_of_copy": share, "bytes": size}
            self.rows.append({**row, "median_us": median, "p10_us": low, "p90_us": high})

    def write(self, path: str | None, **facts: str | int) -> None:
        if path is not None:
            document = {"gpu": self.gpu.name, "copy_bytes_s": self.roof, **facts, "rows": self.rows}
            Path(path).write_text(json.dumps(document, indent=1))
