"""A GGUF file's blocks as a 16-bit model: their bits in the file, their weights in the original.

An original that was itself dequantized from 4-bit blocks flatters some formats: the blocks of Q4_K
have a scale and a minimum for 32 columns like those of Q4_1, and find the same 16 levels again.
`on_a_grid` tells.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor


def is_matrix(key: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of a safetensors file is the weight of a linear layer of a block."""
    return ".layers." in key and len(shape) == 2


def block_bits(path: Path) -> float:
    """Stored bits of a block's linear weight in a GGUF file, scales and minima included.

    Raises:
        SystemExit: it holds no blocks.
    """
    from gguf import GGUFReader

    blocks = [t for t in GGUFReader(path).tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    if not blocks:
        raise SystemExit(f"{path}: has no blk.* matrices; is it a language model?")
    return 8 * sum(int(t.n_bytes) for t in blocks) / sum(int(t.n_elements) for t in blocks)


def on_a_grid(model: Path) -> bool:
    """Whether the original was dequantized from 4-bit blocks: no 32 neighbouring columns of its
    matrices hold more than 16 values."""
    matrices = [w for key, w in read_tensors(model).items() if is_matrix(key, w.shape)]
    return all(_levels(w) <= 16 for w in matrices if w.shape[1] % 32 == 0)


def _levels(weight: Tensor) -> int:
    """The most distinct values in 32 neighbouring columns of a row, of ``[N, K]``."""
    ordered = weight.view(-1, 32).sort(-1).values
    return int((ordered[:, 1:] != ordered[:, :-1]).sum(-1).max()) + 1


def graft(gguf: Path, model: Path, out: Path) -> None:
    """Write the original with a GGUF file's matrices, dequantized, in its blocks.

    Embedding, head, norms, tokenizer and config stay the original's, so that both are asked the
    same tokens and what is quantized is what everyone quantizes.

    Args:
        gguf: of the same model.
        model: folder of the original.
        out: folder that is made.

    Raises:
        SystemExit: a matrix that is missing in the file, or has another shape.
    """
    from safetensors.torch import save_file

    from quantkit import model as models

    ours, theirs = read_tensors(model), read_tensors(models.resolve(str(gguf)))
    for key, weight in ours.items():
        if not is_matrix(key, weight.shape):
            continue
        if key not in theirs or theirs[key].shape != weight.shape:
            found = list(theirs[key].shape) if key in theirs else "nothing"
            raise SystemExit(f"{gguf}: {key} is {found} where {model} has {list(weight.shape)}")
        ours[key] = theirs[key].to(weight.dtype)
    out.mkdir()
    for path in model.iterdir():
        if path.is_file() and ".safetensors" not in path.name:
            shutil.copy(path, out)
    save_file(ours, out / "model.safetensors", metadata={"format": "pt"})


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Of all safetensors files of a folder."""
    from safetensors.torch import load_file

    return {
        k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()
    }
