import pytest

from cai_runtime.errors import BenchmarkError
from cai_runtime.models.catalog import catalog
from cai_runtime.models.shapes import LinearGroup, all_shapes, distinct, model_shapes, parse_shape

# Published counts where the catalogue does not have the model, or rounds to a whole billion.
PUBLISHED = {
    "smollm2-135m": 134.5e6,
    "llama-3.1-8b": 8.03e9,
    "llama-3.3-70b": 70.6e9,
    "llama-4-scout": 107.8e9,
    "mistral-small-3.1": 24.0e9,
    "gpt-oss-20b": 20.9e9,
    "gpt-oss-120b": 116.8e9,
    "hypernova-60b": 60e9,
    "nemotron-3-nano": 31.6e9,
    "glm-5.1": 754e9,
    "whisper-large-v3": 1.55e9,
    "whisper-large-v3-turbo": 0.809e9,
}


@pytest.mark.parametrize("name", all_shapes())
def test_parameters_are_those_that_were_published(name):
    # Norms, biases, routers, convolutions and the towers that the entry says it leaves out are the difference.
    assert model_shapes(name).parameters == pytest.approx(PUBLISHED[name], rel=0.025)


def test_every_family_of_the_catalogue_is_there():
    names = {name.replace(".", "-") for name in all_shapes()}
    families = {entry.removeprefix("cai-").removesuffix("-slim").removesuffix("-omni") for entry in catalog()}
    assert families - names == {"blackstar-10b"}  # whose shapes are not known


def test_shapes_agree_with_the_configurations_that_transformers_ships():
    from transformers import GlmMoeDsaConfig, GptOssConfig, Llama4Config, Mistral3Config

    for name, config in (
        ("llama-4-scout", Llama4Config().text_config),
        ("mistral-small-3.1", Mistral3Config().text_config),
        ("gpt-oss-120b", GptOssConfig()),
    ):
        shapes = model_shapes(name)
        groups = {group.name: group for group in shapes.groups}
        h = shapes.heads
        assert (h.query, h.kv, h.dim) == (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        assert groups["qkv"].in_features == config.hidden_size
        assert groups["qkv"].out_features == (h.query * h.dim, h.kv * h.dim, h.kv * h.dim)
        assert groups["qkv"].count == config.num_hidden_layers
        assert groups["head"].out_features == (config.vocab_size,)
    glm, groups = GlmMoeDsaConfig(), {group.name: group for group in model_shapes("glm-5.1").groups}
    sparse = glm.mlp_layer_types.count("sparse")
    assert groups["expert down"] == LinearGroup(
        "expert down", glm.moe_intermediate_size, (glm.hidden_size,), sparse * glm.n_routed_experts,
        sparse * glm.num_experts_per_tok,
    )  # fmt: skip
    assert groups["o"].in_features == glm.num_attention_heads * glm.v_head_dim


def test_names_are_read_as_the_catalogue_writes_them_too():
    assert model_shapes("llama-3-1-8b") is model_shapes("llama-3.1-8b")
    with pytest.raises(BenchmarkError, match=r"'llama-9'.*llama-3\.1-8b"):
        model_shapes("llama-9")


def test_shapes_by_hand():
    assert parse_shape("4096x14336") == LinearGroup("4096x14336", 4096, (14336,))
    assert parse_shape("64x32+16").out_features == (32, 16)
    assert parse_shape("64x32+16").shape == "64x32+16"
    for wrong in ("4096", "0x4", "4x0", "4x", "4x5x6", "4 x 5", "-4x5", "4x5+"):
        with pytest.raises(BenchmarkError, match="no shape"):
            parse_shape(wrong)


def test_groups_of_one_shape_are_measured_once():
    groups = (
        LinearGroup("o", 8, (8,), 3, 3),
        LinearGroup("qkv", 8, (8, 4), 3, 3),
        LinearGroup("cross o", 8, (8,), 2, 1),
    )
    merged = distinct(groups)
    assert merged == [LinearGroup("o, cross o", 8, (8,), 5, 4), groups[1]]
