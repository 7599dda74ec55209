"""Loading: folders, GGUF files, shards, dtypes, and models that memory does not hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from quantkit import model as models
from quantkit.calibrate import CalibrationData, calibrate
from quantkit.checkpoint.write import write_checkpoint
from quantkit.errors import UsageError
from quantkit.plan import make_plan
from quantkit.recipe import Recipe, Step
from quantkit.schemes import SCHEMES
from tests.conftest import byte_tokenizer, save_model, tiny_llama
from tests.run_helpers import contents

IDS = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(2))


def export(loaded: models.SourceModel, work: Path, out: Path) -> None:
    recipe = Recipe(SCHEMES["w4a16-g64"], algorithm=(Step("gptq"),), keep=("lm_head",))
    plan = make_plan(recipe, loaded.model, samples=4, seq_len=64)
    done = calibrate(loaded, plan, CalibrationData(IDS, "x"), work, release=True)
    write_checkpoint(out, loaded, plan, done.layers, {})


def test_a_model_larger_than_memory_gives_the_same_bytes(tmp_path: Path) -> None:
    """Room for less than one block: the rest stays on disk until its turn."""
    folder = save_model(tiny_llama(tied=False), tmp_path / "model")
    whole = models.load_source(str(folder))
    block = sum(p.numel() * p.element_size() for p in whole.model.model.layers[0].parameters())
    small = models.load_source(str(folder), max_memory=int(block * 1.6))
    away = [n for n, p in small.model.named_parameters() if p.is_meta]
    assert any(".layers." in name for name in away)
    export(whole, tmp_path / "w1", tmp_path / "a")
    export(small, tmp_path / "w2", tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_sharded_safetensors(tiny: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "shards", max_shard_size="500KB")
    byte_tokenizer().save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    loaded = models.load_source(str(tmp_path / "shards"))
    with torch.no_grad():
        assert torch.equal(
            loaded.model(IDS).logits, models.load_source(str(tiny)).model(IDS).logits
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_model(tiny_llama(dtype=dtype), tmp_path / "model")
    assert models.load_source(str(folder)).model.dtype is dtype


def test_parts_are_found(tiny: Path, tiny_untied: Path) -> None:
    tied, untied = (models.load_source(str(p)).model for p in (tiny, tiny_untied))
    name, blocks = models.find_blocks(tied)
    assert (name, len(blocks)) == ("model.layers", 2)
    assert models.head_name(tied) == "lm_head"
    assert models.is_tied(tied)
    assert not models.is_tied(untied)
    models.untie(tied)
    assert not models.is_tied(tied)
    assert tied.config.tie_word_embeddings is False
    with pytest.raises(UsageError, match="no list of decoder blocks"):
        models.find_blocks(nn.Linear(4, 4))


def test_hashes_follow_content(tiny: Path, tmp_path: Path) -> None:
    folder = save_model(tiny_llama(), tmp_path / "again")
    one, two = models.hash_folder(tiny), models.hash_folder(folder)
    assert one["model.safetensors"] == two["model.safetensors"]
    other = save_model(tiny_llama(tied=False), tmp_path / "other")
    assert models.hash_folder(other)["model.safetensors"] != one["model.safetensors"]


@pytest.mark.real_model
def test_gguf_is_dequantized_once(smollm2: str) -> None:
    folder = models.resolve(smollm2)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert models.resolve(smollm2) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    loaded = models.load_source(smollm2)
    assert loaded.model.dtype is torch.bfloat16
    assert loaded.model.config.num_hidden_layers == 30
