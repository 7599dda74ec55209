"""Loading a model, and finding the parts that quantization works on."""

from quantkit.model.experts import expert_inputs, find_experts, linearize, routers
from quantkit.model.families import FAMILIES, Family, auto_class, family_of, require_logits
from quantkit.model.hashes import (
    POOLING,
    combine_hashes,
    hash_file,
    hash_folder,
    template_hash,
    tokenizer_hash,
    weight_hash,
)
from quantkit.model.names import disk_module, disk_name, memory_names
from quantkit.model.parts import (
    block_numbers,
    block_of,
    bring_in,
    embedding_shape,
    find_blocks,
    find_stacks,
    head_name,
    is_tied,
    linear_layers,
    norms,
    set_submodule,
    stored_tensors,
    untie,
)
from quantkit.model.quiet import first_line, quiet_transformers
from quantkit.model.source import SourceModel, load_config, load_source, read_tokenizer, resolve

__all__ = [
    "FAMILIES",
    "POOLING",
    "Family",
    "SourceModel",
    "auto_class",
    "block_numbers",
    "block_of",
    "bring_in",
    "combine_hashes",
    "disk_module",
    "disk_name",
    "embedding_shape",
    "expert_inputs",
    "family_of",
    "find_blocks",
    "find_experts",
    "find_stacks",
    "first_line",
    "hash_file",
    "hash_folder",
    "head_name",
    "is_tied",
    "linear_layers",
    "linearize",
    "load_config",
    "load_source",
    "memory_names",
    "norms",
    "quiet_transformers",
    "read_tokenizer",
    "require_logits",
    "resolve",
    "routers",
    "set_submodule",
    "stored_tensors",
    "template_hash",
    "tokenizer_hash",
    "untie",
    "weight_hash",
]
