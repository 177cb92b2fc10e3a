"""accelerate's device maps: on one device, spread, offloaded to disk, on meta."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import cai_runtime
from cai_runtime.integrations.dense import dense_state, slim_modules
from cai_runtime.integrations.linear import SlimLinear
from cai_runtime.slim.reader import Checkpoint

BLOCKS = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}


def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **options)


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {**BLOCKS, "model.layers": "cpu"}])
def test_on_the_cpu(slim, ids, device_map):
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("auto would choose the GPU")
    assert torch.equal(logits(load(slim, device_map=device_map), ids), logits(load(slim), ids))


def test_offloaded_to_disk(slim, ids, tmp_path):
    on_disk = {**BLOCKS, "model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load(slim, device_map=on_disk, offload_folder=tmp_path / "offload")
    up = model.model.layers[1].mlp.up_proj
    wanted = load(slim)
    for _ in range(2):
        assert up.core_0.device.type == "meta"
        assert torch.equal(logits(model, ids), logits(wanted, ids))
        assert up._prepared is None  # nothing of it stays
    assert model.model.layers[0].mlp.up_proj._prepared is not None
    with pytest.raises(cai_runtime.CaiError, match="offloaded"):
        list(dense_state(model))
    model.save_pretrained(tmp_path / "saved")
    with Checkpoint.open(slim) as before, Checkpoint.open(tmp_path / "saved") as after:
        assert before.tensors().keys() == after.tensors().keys()
        assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.tensors())


def test_tied_int8_head_offloaded(slim, ids, tmp_path):
    device_map = {"model.embed_tokens": "disk", "lm_head": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu",
                  "model.layers": "cpu"}  # fmt: skip
    model = load(slim, device_map=device_map, offload_folder=tmp_path)
    assert torch.equal(logits(model, ids), logits(load(slim), ids))


def test_gradients_reach_through_offloaded_modules(slim, ids, tmp_path):
    device_map = {**BLOCKS, "model.layers.0": "cpu", "model.layers.1": "disk"}
    gradients = []
    for model in (load(slim), load(slim, device_map=device_map, offload_folder=tmp_path)):
        torch.manual_seed(0)
        start = torch.randn(2, 9, 32, requires_grad=True)
        model(inputs_embeds=start, labels=ids, use_cache=False).loss.backward()
        gradients.append(start.grad)
    assert torch.equal(*gradients)


def test_on_meta(slim):
    model = load(slim, device_map="meta")
    assert all(p.device.type == "meta" for p in model.parameters())
    assert any(isinstance(m, SlimLinear) for m in slim_modules(model).values())
    with Checkpoint.open(slim) as checkpoint:
        assert model.get_memory_footprint(return_buffers=True) >= checkpoint.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(slim, ids, dtype):
    model, wanted = load(slim, device_map="cuda", dtype=dtype), logits(load(slim), ids)
    found = logits(model, ids.cuda()).cpu().float()
    assert float((found - wanted).abs().mean()) < (1e-3 if dtype == torch.float32 else 0.1)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    moved = load(slim).cuda()
    assert torch.equal(logits(moved, ids.cuda()), logits(load(slim, device_map="cuda"), ids.cuda()))
