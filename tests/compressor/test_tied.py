"""Sources whose config.json ties embedding and head, with the one, the other, or both in the file."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cai_runtime.compressor import compress
from cai_runtime.engine.open import load_runner
from cai_runtime.engine.runner import ScheduledSequence
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.stock.load import dense_reference, slim_as_transformers

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = [5, 17, 3, 40, 8]
LAYOUTS = {
    "the head alone": lambda table: {HEAD: table},
    "both the same": lambda table: {TABLE: table, HEAD: table.clone()},
    "two that differ": lambda table: {TABLE: table, HEAD: table.flip(0).contiguous()},
}


@pytest.mark.parametrize("store", ["int8", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_who_read_the_result_agree(tiny, text_file, tmp_path, layout, store):
    source, slim = shutil.copytree(tiny, tmp_path / "source"), tmp_path / "slim"
    tensors = load_file(source / "model.safetensors")
    table = tensors.pop(TABLE)
    save_file(tensors | LAYOUTS[layout](table), source / "model.safetensors", metadata={"format": "pt"})
    compress(source, slim, calibration=text_file, samples=4, sequence_length=32, rank_multiple=1, keep=0.9, store=store,
             refine_epochs=0, heal_tokens=0, evaluate=False, progress=False)  # fmt: skip

    two = layout == "two that differ"
    assert json.loads((slim / "config.json").read_text()).get("tie_word_embeddings", False) is not two
    with Checkpoint.open(slim) as checkpoint:
        assert checkpoint.has_module("model.embed_tokens") and checkpoint.has_module("lm_head") is two
        stored = checkpoint.module("lm_head" if two else "model.embed_tokens").dense()
    reference = dense_reference(source)
    torch.testing.assert_close(stored, reference.lm_head.weight, rtol=0, atol=0.02)

    runner, _ = load_runner(slim, kv_cache="1MiB", activations="fp32", progress=False)
    with torch.inference_mode():
        wanted = slim_as_transformers(slim)(torch.tensor([IDS])).logits[0, -1]
        loaded = AutoModelForCausalLM.from_pretrained(slim, dtype=torch.float32)(torch.tensor([IDS])).logits[0, -1]
        engine = runner.run([ScheduledSequence(IDS, 0, [0], True)])[0]
        dense = reference(torch.tensor([IDS])).logits[0, -1]
    torch.testing.assert_close(loaded, wanted, rtol=0, atol=1e-3)
    torch.testing.assert_close(engine, wanted, rtol=0, atol=1e-3)
    assert float((wanted - dense).norm() / dense.norm()) < 0.5
