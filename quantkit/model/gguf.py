"""`.gguf` files, dequantized once into a folder that transformers loads."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from contextlib import redirect_stderr
from pathlib import Path

import torch

from quantkit.errors import QuantkitError, UsageError
from quantkit.model.gguf_header import check_header
from quantkit.model.hashes import hash_file
from quantkit.model.quiet import first_line, quiet_transformers

#: Where converted files are kept, by content hash.
CACHE = Path.home() / ".cache" / "quantkit"


def convert_gguf(path: Path) -> Path:
    """Dequantize a GGUF file to a bf16 folder, once; in a process of its own, so that the
    fp32 copies it makes never count against this one's memory.

    Raises:
        QuantkitError: no sound GGUF file, or one that transformers cannot dequantize.
        UsageError: the cache cannot be written.
    """
    check_header(path)
    digest = hash_file(path)
    import transformers

    folder = CACHE / "gguf" / f"{digest[:20]}-{transformers.__version__}"
    if folder.is_dir():
        return folder
    staging = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
    except OSError as e:
        raise UsageError(f"{staging}: cannot be created ({e.strerror})") from e
    child = multiprocessing.get_context("spawn").Process(
        target=_write_dequantized, args=(str(path), str(staging))
    )
    child.start()
    try:
        child.join()
    except BaseException:
        child.terminate()
        child.join()  # or it goes on writing where the next line removes
        shutil.rmtree(staging, ignore_errors=True)
        raise
    report = staging / "error.txt"
    if child.exitcode != 0 or report.exists():
        reason = report.read_text() if report.exists() else f"exit code {child.exitcode}"
        shutil.rmtree(staging, ignore_errors=True)
        raise QuantkitError(f"{path}: cannot be dequantized ({reason})")
    try:
        os.replace(staging, folder)
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)
        if not folder.is_dir():  # else another process finished first
            raise
    return folder


def _write_dequantized(path: str, folder: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where, name = os.path.split(os.path.abspath(path))
    try:
        # transformers draws a bar of its own here, whatever its logging level is.
        with open(os.devnull, "w") as null, redirect_stderr(null), quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                where,
                gguf_file=name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
            if getattr(model.config, "quantization_config", None) is not None:
                del model.config.quantization_config
            model.config._name_or_path = name
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(folder)
    except Exception as e:  # the parent turns it into a QuantkitError
        Path(folder, "error.txt").write_text(first_line(e))
