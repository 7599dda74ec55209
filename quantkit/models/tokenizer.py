"""A checkpoint's tokenizer and context without its weights: for models that run elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import model as models
from quantkit.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(source: str) -> tuple[PreTrainedTokenizerBase, int | None]:
    """The tokenizer, and the longest input in tokens if the config tells.

    Args:
        source: a checkpoint folder, a `.gguf` file (converted once), or a hub id, of which only
            the tokenizer and the config are fetched.

    Raises:
        UsageError: there is no tokenizer.
    """
    from transformers import AutoConfig, AutoTokenizer

    path = Path(source).expanduser()
    local = path.exists() or path.suffix == ".gguf"
    where: Any = models.resolve(source) if local else source
    options = {"trust_remote_code": False, "local_files_only": local}
    with models.quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, **options)
            config = AutoConfig.from_pretrained(where, **options)
        except (OSError, ValueError, KeyError) as e:
            raise UsageError(
                f"{source}: no tokenizer and config ({models.first_line(e)})",
                remedy="CKPT is the checkpoint that is served: a folder, a .gguf file or a hub id",
            ) from e
    length = getattr(getattr(config, "text_config", None) or config, "max_position_embeddings", 0)
    return tokenizer, length or None
