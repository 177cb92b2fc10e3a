"""What is wrong with a checkpoint, or not possible in transformers, is a typed error that names it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from cai_runtime.errors import (
    InvalidPivotError,
    KernelError,
    TensorDtypeError,
    TensorMissingError,
    TensorShapeError,
    UnknownVersionError,
    UnsupportedModelError,
)

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def damaged(slim, tmp_path):
    """damaged(config=function of config.json, tensors=function of the tensors): a changed copy's directory."""

    def make(config=None, tensors=None):
        path = shutil.copytree(slim, tmp_path / "damaged")
        if config is not None:
            found = json.loads((path / "config.json").read_text())
            config(found)
            (path / "config.json").write_text(json.dumps(found))
        if tensors is not None:
            state = load_file(path / "model.safetensors")
            tensors(state)
            save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return make


def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **options)


def test_missing_tensor(damaged):
    path = damaged(tensors=lambda state: state.pop(f"{Q_PROJ}.core_1"))
    with pytest.raises(TensorMissingError, match="core_1"):
        load(path)


def test_bad_pivot(slim, damaged):
    path = damaged(tensors=lambda state: state[f"{Q_PROJ}.pivot"].zero_())
    with pytest.raises(InvalidPivotError, match=f"{Q_PROJ}.pivot"):
        load(path)
    from transformers import AutoConfig

    state = load_file(path / "model.safetensors")
    with pytest.raises(InvalidPivotError):  # not by the files: they were not there to be checked
        LlamaForCausalLM.from_pretrained(None, config=AutoConfig.from_pretrained(slim), state_dict=state)


def test_newer_version(damaged):
    path = damaged(config=lambda config: config["quantization_config"].update(format_version=99))
    with pytest.raises(UnknownVersionError, match="99"):
        load(path)


def test_another_size_than_the_configs(damaged):
    path = damaged(config=lambda config: config.update(intermediate_size=64))
    with pytest.raises(TensorShapeError, match="up_proj|gate_proj"):
        load(path)


def test_a_module_that_transformers_has_not(damaged):
    path = damaged(config=lambda config: config.update(num_hidden_layers=1))
    with pytest.raises(UnsupportedModelError, match=r"no module model\.layers\.1"):
        load(path)


def test_a_module_that_is_no_plain_linear(slim, monkeypatch):
    from transformers.models.llama import modeling_llama

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Net(modeling_llama.LlamaMLP):
        def __init__(self, config):
            super().__init__(config)
            self.up_proj = Doubled(config.hidden_size, config.intermediate_size, bias=False)

    monkeypatch.setattr(modeling_llama, "LlamaMLP", Net)
    with pytest.raises(UnsupportedModelError, match="up_proj is a Doubled"):
        load(slim)


def test_modules_kept_in_another_dtype(slim, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"core_0_scale"}, raising=False)
    load(slim)  # as they are stored
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"q_proj"})
    try:
        model = load(slim, dtype=torch.bfloat16)
    except TensorDtypeError as e:
        assert "q_proj" in str(e)  # codes cast to floats would be garbage
    else:
        assert model.get_submodule(Q_PROJ).core_0.dtype == torch.int8


def test_tensor_parallelism(slim):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(slim)
    config.distributed_config = {"tp_size": 2}
    with pytest.raises(UnsupportedModelError, match="tensor parallelism"):
        load(slim, config=config)


def test_input_of_another_width_or_dtype(slim):
    module = load(slim).model.layers[0].mlp.up_proj
    with pytest.raises(KernelError, match="takes 32 float features"):
        module(torch.zeros(4, 16))
    with pytest.raises(KernelError, match="int64"):
        module(torch.zeros(4, 32, dtype=torch.int64))


def test_ids_outside_the_table(slim):
    table = load(slim).model.embed_tokens
    for wrong in (62, -1):
        with pytest.raises(IndexError):
            table(torch.tensor([[wrong]]))


def test_a_packed_table_is_not_resized(slim):
    with pytest.raises(UnsupportedModelError, match="62 rows"):
        load(slim).resize_token_embeddings(80)
