"""What a measurement runs on: names, caches, and the bandwidth that bounds it."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import torch

#: Read by the bandwidth probe: many times a last-level cache.
PROBE_BYTES = 512 * 2**20


def hardware(threads: int) -> dict[str, Any]:
    """From Linux's /proc and /sys; what is missing is left out."""
    facts: dict[str, Any] = {"machine": platform.machine(), "threads": threads}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [s.partition(":") for s in cpuinfo.read_text().splitlines()]
        core = {k.strip(): v.strip() for k, _, v in reversed(lines)}
        facts["cores"] = sum(k.strip() == "processor" for k, _, _ in lines)
        facts["cpu"] = core.get("model name", "")
        facts["family"], facts["model"] = core.get("cpu family"), core.get("model")
        wanted = ("avx", "amx", "fma", "f16c")
        facts["flags"] = [f for f in core.get("flags", "").split() if f.startswith(wanted)]
    cache = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    if cache.exists():
        facts["l3"] = cache.read_text().strip()
    return facts


def read_bandwidth(threads: int, rounds: int = 8) -> float:
    """Bytes a second of adding up a buffer that no cache holds."""
    torch.set_num_threads(threads)
    data = torch.ones(PROBE_BYTES // 4)
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - begin)
    return data.nbytes / min(times)
