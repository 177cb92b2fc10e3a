"""Slim checkpoints of the families with biases and norms of heads: the engine's logits are those of the reconstructed
weights in transformers, for every kind of cores, in prefill, chunks and decode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import feed, open_runner, tiny_model

from cai_runtime.compressor import compress
from cai_runtime.stock.load import slim_as_transformers

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": True},
}
IDS = torch.randint(0, 62, (40,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory, add_tokenizer: Any, text_file: Path) -> Iterator[Any]:
    """Makes the slim checkpoint of a family, once of each kind and store."""
    from transformers import PreTrainedTokenizerFast

    made: dict[tuple[str, str, str], Path] = {}
    # transformers has tokenizer classes of its own for Qwen, which don't read the tests' one.
    patch = pytest.MonkeyPatch()
    patch.setattr("cai_runtime.compressor.run._tokenizer", PreTrainedTokenizerFast.from_pretrained)

    def make(family: str, kind: str, store: str) -> Path:
        if (family, kind, store) not in made:
            source, target = tmp_path_factory.mktemp("dense"), tmp_path_factory.mktemp("slim") / "model"
            tiny_model(source, vocab_size=62, **FAMILIES[family])
            add_tokenizer(source)
            compress(
                source, target, kind=kind, store=store, keep=0.7, calibration=text_file, samples=4, sequence_length=16,
                rank_multiple=1, refine_epochs=0, heal_tokens=0, evaluate=False, progress=False,
            )  # fmt: skip
            made[family, kind, store] = target
        return made[family, kind, store]

    yield make
    patch.undo()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("kind", "store"), [("interpolative", "int8"), ("lowrank", "fp32"), ("mpo", "fp32")])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_reconstruction(slim: Any, family: str, kind: str, store: str, backend: str):
    path = slim(family, kind, store)
    with torch.inference_mode():
        expected = slim_as_transformers(path)(torch.tensor([IDS])).logits[0]
    runner = open_runner(path, backend=backend, activations="fp32")
    ours = feed(runner, IDS, [9, 3, 5], [7, 16, 12, *[1] * 5])
    torch.testing.assert_close(ours, expected[[6, 22, 34, 35, 36, 37, 38, 39]], rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_activations_stay_near(slim: Any, family: str):
    path = slim(family, "interpolative", "int8")
    plain, rounded = (feed(open_runner(path, activations=a), IDS, [0, 1, 2], [39, 1]) for a in ("fp32", "int8"))
    assert 0 < float((rounded - plain).norm() / plain.norm()) < 0.05
