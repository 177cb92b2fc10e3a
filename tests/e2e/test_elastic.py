"""An elastic checkpoint in use: the engine, the clients and the command line at a keep give what the smaller checkpoint
gives."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cai_runtime.cli import main
from cai_runtime.client import AsyncClient, Client
from cai_runtime.compressor.elastic.growth import add_elastic_module, cut, plan_elastic
from cai_runtime.compressor.factor.allocate import Curve
from cai_runtime.compressor.factor.decompose import factorize
from cai_runtime.engine.open import load_runner
from cai_runtime.engine.runner import ScheduledSequence
from cai_runtime.errors import KeepError
from cai_runtime.models.catalog import format_parameters
from cai_runtime.slim.inspect import inspect_checkpoint
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.slim.writer import CheckpointWriter


def dense_llama(path: Path) -> Path:
    """A random llama of 258 tokens (bytes, <bos>, <eos>)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_elastic(src: Path, dst: Path, store: str) -> Path:
    """Every projection of the blocks elastic, without calibration."""
    with Checkpoint.open(src) as dense, CheckpointWriter(dst, config=dense.config, source_dir=src) as writer:
        names = [n.removesuffix(".weight") for n in dense.tensors() if n.endswith("_proj.weight")]
        weights = {name: dense.module(name).dense() for name in names}
        grams = {name: torch.eye(w.shape[1], dtype=torch.float64) for name, w in weights.items()}
        factors = {name: factorize(w, grams[name]) for name, w in weights.items()}
        curves = [Curve(name, *weights[name].shape, factors[name].errors()) for name in names]
        plan = plan_elastic(curves, 0.95, smallest=0.4, multiple=8)
        stores: dict[str, Any] = {}
        for m in plan.modules:
            forms = add_elastic_module(writer, m, plan.step, weights[m.name], factors[m.name], grams[m.name], store)
            stores[m.name] = forms[-1].spec.store
        for name in dense.tensors():
            if not name.endswith("_proj.weight"):
                writer.add_tensor(name, dense.tensor(name))
        writer.set_elastic(plan.table(stores))
        return writer.finish()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_llama(tmp_path_factory.mktemp("elastic") / "dense")


@pytest.fixture(scope="module")
def elastic(dense: Path) -> Path:
    return make_elastic(dense, dense.with_name("int8"), "int8")


def logits(path: Path, **options: Any) -> torch.Tensor:
    runner, _ = load_runner(path, kv_cache="4MiB", progress=False, **options)
    ids = torch.randint(0, 250, (21,), generator=torch.Generator().manual_seed(0)).tolist()
    first = runner.run([ScheduledSequence(ids, 0, [1, 0], True)])
    return torch.cat([first, runner.run([ScheduledSequence([7], 21, [1, 0], True)])])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("store", ["int8", "bf16", "fp32", "int4-g32", "int4-g64-zp"])
def test_logits_are_those_of_the_smaller_checkpoint(dense: Path, tmp_path: Path, store: str, backend: str):
    path = make_elastic(dense, tmp_path / store, store)
    found = []
    for keep in (0.4, 0.7):
        plain = cut(path, tmp_path / f"cut{keep}", keep)
        found.append(logits(path, keep=keep, backend=backend))
        assert torch.equal(found[-1], logits(plain, backend=backend))
    assert not torch.equal(*found)


def test_the_client_the_async_client_and_the_command_line(elastic: Path, tmp_path: Path, capsys: Any):
    question: dict[str, Any] = {"prompt": "Once upon", "temperature": 0, "max_tokens": 8}
    with Client(cut(elastic, tmp_path / "cut", 0.5)) as client:
        expected = client.completions.create(**question).choices[0].text
    with Client(elastic) as client:
        assert client.completions.create(**question).choices[0].text != expected
        assert "keep" not in repr(client)
    with Client(elastic, keep=0.5) as client:
        assert client.completions.create(**question).choices[0].text == expected
        assert "keep=0.5" in repr(client)
        used = client.engine().model_config["quantization_config"]
        with Checkpoint.open(elastic, keep=0.5) as small:
            assert used["modules"] == {name: spec.to_json() for name, spec in small.modules.items()}

    async def ask() -> str:
        async with AsyncClient(elastic, keep=0.5) as client:
            return (await client.completions.create(**question)).choices[0].text

    assert asyncio.run(ask()) == expected
    arguments = ["complete", str(elastic), "Once upon", "--temperature", "0", "--max-tokens", "8", "--keep", "0.5"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == expected + "\n"
    assert main([*arguments[:-1], "0.2"]) == 1
    assert "opens at 0.4 to 0.95" in capsys.readouterr().err
    assert main([*arguments[:-1], "2"]) == 1
    assert "(0, 1]" in capsys.readouterr().err


def test_the_list_of_models_tells_what_a_client_opens(elastic: Path, dense: Path):
    def told(path: Path, keep: float | None = None) -> str:
        with Client(path, keep=keep) as client:
            found = client.models.retrieve(str(path)).parameters_number
            assert [m.parameters_number for m in client.models.list() if m.id == str(path)] == [found]
            return found

    for keep in (0.5, None):
        parameters = inspect_checkpoint(elastic, keep=keep).parameters
        assert told(elastic, keep) == format_parameters(parameters)
    assert told(elastic, 0.5) != told(elastic)
    assert told(dense, 0.5) == told(elastic, 0.1) == "unknown"  # neither opens in such a client


def test_a_wrong_keep_is_an_error_with_a_type(elastic: Path, dense: Path):
    from cai_runtime.api.errors import UnprocessableEntityError

    with pytest.raises(KeepError, match=r"\(0, 1\]"):
        Client(elastic, keep=0)
    with pytest.raises(TypeError, match="keep must be a number"):
        Client(elastic, keep="0.5")  # type: ignore[arg-type]
    for path, message in ((elastic, "opens at 0.4 to 0.95"), (dense, "not elastic")):
        with Client(path, keep=0.3) as client, pytest.raises(UnprocessableEntityError, match=message):
            client.completions.create(prompt="hi", max_tokens=1)


def test_what_is_held_follows_keep(elastic: Path):
    """Bytes of the packed weights: the loader's arena is all that a model on the CPU keeps of its linears."""
    from cai_runtime.kernels.backend import resolve_backend
    from cai_runtime.layers.linear import WeightLoader

    held = {}
    for keep in (0.4, 0.95):
        with Checkpoint.open(elastic, keep=keep) as checkpoint:
            loader = WeightLoader(
                checkpoint, torch.device("cpu"), None, resolve_backend("reference", torch.device("cpu"))
            )
            held[keep] = sum(
                core.data.nbytes
                for name, spec in checkpoint.modules.items()
                for core in loader.weights(name, (spec.out_features, spec.in_features)).cores
            )
            assert held[keep] == sum(spec.parameters for spec in checkpoint.modules.values())  # int8: a byte each
    assert held[0.4] < 0.45 * held[0.95]
    assert json.loads((elastic / "config.json").read_text())["quantization_config"]["elastic"]["keep"] == [0.4, 0.95]
