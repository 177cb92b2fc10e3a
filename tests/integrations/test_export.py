"""An exported checkpoint in transformers without cai_runtime."""

import torch
from transformers import AutoModelForCausalLM

from cai_runtime.slim.export import export_dense

PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info.values()), info
ids = torch.tensor([AutoTokenizer.from_pretrained(sys.argv[1])("w1 w2 w3")["input_ids"]])
torch.save((ids, model(ids).logits.detach()), sys.argv[2])
assert "cai_runtime" not in sys.modules
"""


def test_plain_transformers_loads_it(python, slim, tmp_path):
    path = export_dense(slim, tmp_path / "dense", dtype="fp32", max_shard_bytes=8000)
    assert len(list(path.glob("*.safetensors"))) > 2
    done = python(PLAIN, path, tmp_path / "logits.pt")
    assert done.returncode == 0, done.stderr
    ids, found = torch.load(tmp_path / "logits.pt")
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(slim)(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
