"""The command line of every benchmark of GPU kernels: check them, or time them."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch


def run(
    about: str | None,
    check: Callable[[bool], object],
    bench: Callable[[str | None], object],
    probes: Callable[[str], object] | None = None,
) -> None:
    """Do what the command line says.

    Args:
        about: for ``--help``.
        check: compares kernels with their references; told whether small shapes will do.
        bench: times them; told where to write what it found.
        probes: runs the instructions that a library has alone.

    Raises:
        SystemExit: there is no GPU.
    """
    parser = argparse.ArgumentParser(description=about)
    commands = parser.add_subparsers(dest="command", required=True)
    if probes is not None:
        commands.add_parser("probes").add_argument("library")
    commands.add_parser("check").add_argument("--small", action="store_true")
    commands.add_parser("bench").add_argument("--json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; run this on a machine with a GPU")
    torch.manual_seed(0)
    if arguments.command == "bench":
        bench(arguments.json)
    elif arguments.command == "check":
        check(arguments.small)
    elif probes is not None:
        probes(arguments.library)
