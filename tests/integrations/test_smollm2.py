"""Real weights: three blocks of SmolLM2, factorized, in transformers beside the dense reconstruction and the engine."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import cai_runtime
from cai_runtime.convert.sources import pull
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.slim.spec import ModuleSpec
from cai_runtime.slim.writer import CheckpointWriter
from cai_runtime.stock.load import slim_as_transformers

BLOCKS = 3
KINDS = ["interpolative", "lowrank", "dense"]


def factors(weight, kind, rank):
    """Best factors of the weight alone, without calibration: quick, and good enough to compare two ways to run them."""
    if kind == "dense":
        return [weight], None
    u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
    if kind == "lowrank":
        return [s[:rank, None] * v[:rank], u[:, :rank]], None
    near = u[:, :rank] * s[:rank] @ v[:rank]
    pivot = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))
    rows = near[pivot[:rank]]
    return [rows, torch.linalg.lstsq(rows.T, near[pivot[rank:]].T).solution.T.contiguous()], pivot


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """SmolLM2's first blocks, slim in int8, its embedding int8 and tied."""
    source = pull("smollm2-135m-instruct", progress=False)
    path = tmp_path_factory.mktemp("smollm2") / "slim"
    with Checkpoint.open(source) as checkpoint:
        config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": BLOCKS}
        names = [n for n in checkpoint.tensors() if not n.startswith("model.layers.") or int(n.split(".")[2]) < BLOCKS]
        with CheckpointWriter(path, config=config, source_dir=source) as writer:
            for k, name in enumerate(names):
                tensor = checkpoint.tensor(name)
                if tensor.ndim == 1:
                    writer.add_tensor(name, tensor)
                    continue
                kind = "dense" if "embed" in name else KINDS[k % 3]
                rank = None if kind == "dense" else min(tensor.shape) // 2
                cores, pivot = factors(tensor, kind, rank)
                spec = ModuleSpec(kind, *tensor.shape, rank, ("int8",) * len(cores))
                writer.add_module(name.removesuffix(".weight"), spec, cores, pivot)
            writer.finish()
    return path


@torch.no_grad()
def test_logits_and_text_of_the_dense_reconstruction(shallow, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shallow)
    ids = torch.tensor([tokenizer("The sky is blue because light is scattered by air.")["input_ids"]])
    model, dense = AutoModelForCausalLM.from_pretrained(shallow), slim_as_transformers(shallow)
    found, wanted = model(ids).logits, dense(ids).logits
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))
    model.save_pretrained(tmp_path / "saved")
    with Checkpoint.open(shallow) as before, Checkpoint.open(tmp_path / "saved") as after:
        assert after.modules == before.modules
        assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.tensors())


@torch.no_grad()
def test_greedy_text_is_that_of_the_engine(shallow):
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(shallow), AutoModelForCausalLM.from_pretrained(shallow)
    prompt = "The capital of France is"
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    text = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :])
    with cai_runtime.Client(model=str(shallow), activations="fp32") as client:
        reply = client.completions.create(model=str(shallow), prompt=prompt, max_tokens=12, temperature=0)
    assert reply.choices[0].text == text
