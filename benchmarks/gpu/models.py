"""Models with random weights, drawn on the device without a checkpoint, and their steps as the engine runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.context import END_STORES, INT4_GROUP, KEEP, PAGE_SIZE


class _RandomCheckpoint:
    """Stands in for a `Checkpoint`: the attributes that model definitions use, except weights."""

    def __init__(self, config: dict[str, Any]):
        self.config, self.path = config, Path("random")

    def has_module(self, name: str) -> bool:
        return True

    def __contains__(self, name: str) -> bool:
        return True

    def module_tensors(self, name: str) -> list[str]:
        return []

    def release(self, *names: Any) -> None: ...


def random_loader(config: dict[str, Any], device: str, dtype: Any, backend: str, kind: str, store: str) -> Any:
    """A `WeightLoader` that draws random weights: the layers' linears in `kind` and `store`, head and embedding dense in the
    store that `cai compress` takes for them. Norm weights are ones. The weights do not depend on the backend or the dtype.

    It adds two attributes: `layer_bytes`, of all layers' linears, and `head_bytes`, of the head."""
    import torch

    from cai_runtime.bench.factors import Factorization, RandomWeights
    from cai_runtime.layers.linear import WeightLoader

    draw = RandomWeights(device, group=INT4_GROUP)

    class RandomLoader(WeightLoader):
        layer_bytes = head_bytes = 0

        def weights(self, name: str, shape: tuple[int, int], *, bias: bool = True) -> Any:
            out, inp = shape
            end = "layers" not in name
            w = draw.linear(
                inp, out, Factorization("dense" if end else kind, KEEP), END_STORES[store] if end else store
            )
            if end:
                self.head_bytes = w.nbytes  # the embedding is as large, but a step reads one row of it per token
            else:
                self.layer_bytes += w.nbytes
            return w

        def vector(self, name: str, size: int, dtype: Any = None) -> Any:
            return torch.ones(size, dtype=dtype or self.activation_dtype, device=self.device)

    return RandomLoader(_RandomCheckpoint(config), torch.device(device), dtype, backend)  # type: ignore[arg-type]


@dataclass
class Step:
    """An open model whose sequences have `context` positions in the cache and decode one token each."""

    runner: Any
    loader: Any  # see `random_loader`
    config: dict[str, Any]
    context: int

    def sequences(self, batch: int) -> list[Any]:
        from cai_runtime.engine.runner import ScheduledSequence

        pages = -(-(self.context + 1) // PAGE_SIZE)
        vocabulary = self.config["vocab_size"]
        return [
            ScheduledSequence(
                [(7919 * i + 1) % vocabulary], self.context, list(range(i * pages, (i + 1) * pages)), True
            )
            for i in range(batch)
        ]

    def prompt(self, tokens: int) -> list[Any]:
        """A prefill of one sequence of `tokens` tokens, on the first pages of the cache."""
        from cai_runtime.engine.runner import ScheduledSequence

        ids = [(7919 * i + 1) % self.config["vocab_size"] for i in range(tokens)]
        return [ScheduledSequence(ids, 0, list(range(-(-tokens // PAGE_SIZE))), True)]

    def floor_bytes(self, batch: int) -> int:
        """Bytes that a step must read: the layers' weights, the head, the keys and values of every sequence."""
        heads, layers = self.config["num_key_value_heads"], self.config["num_hidden_layers"]
        dim = self.config["hidden_size"] // self.config["num_attention_heads"]
        return self.loader.layer_bytes + self.loader.head_bytes + batch * self.context * 2 * 2 * heads * dim * layers

    def graph(self, sequences: list[Any]) -> Callable[[], Any]:
        """A function that replays the recorded decode step with these sequences as inputs. It returns device logits."""
        return self.runner.recorded(sequences)

    def without_graphs(self, sequences: list[Any]) -> Any:
        """The step's logits by plain launches, without a CUDA graph."""
        graphs, self.runner._graphs = self.runner._graphs, None
        try:
            return self.runner.run(sequences)
        finally:
            self.runner._graphs = graphs

    def record_again(self, sequences: list[Any], then: Callable[[], Any]) -> Any:
        """Call `then` without the graphs recorded so far: launch options take effect when a graph is recorded. Restores
        the old graphs afterwards."""
        graphs = self.runner._graphs
        recorded, graphs._recorded = graphs._recorded, {}
        try:
            return then()
        finally:
            graphs._recorded = recorded


class _NoCapture:
    """Stands in for the capture of CUDA graphs on a CPU: each replay runs the pass and copies into the same output."""

    def __call__(self, forward: Callable[[], Any]) -> Callable[[], Any]:
        import torch

        with torch.inference_mode():
            out = forward()

        def replay() -> Any:
            with torch.inference_mode():
                return out.copy_(forward())

        return replay


def open_step(
    config: dict[str, Any],
    kind: str,
    store: str,
    backend: str,
    device: str,
    *,
    max_batch: int,
    context: int,
    graphs: bool = True,
    dtype: Any = None,
    least_pages: int = 0,
) -> Step:
    """A `Step` on a model with random weights. config: a Llama config. kind, store: of the layers' linears. context: see
    `Step`. dtype: of the activations and the cache (None: bf16). least_pages: fewest pages of the cache, for prompts."""
    import torch

    from cai_runtime.engine.model_runner import ModelRunner
    from cai_runtime.models.registry import build_model

    dtype = dtype or torch.bfloat16
    loader = random_loader(config, device, dtype, backend, kind, store)
    model = build_model(loader)
    pages = max(max_batch * -(-(context + 1) // PAGE_SIZE), least_pages)
    groups = model.cache_groups(PAGE_SIZE, dtype)
    runner = ModelRunner(
        model, groups, {group.name: pages for group in groups}, cache_dtype=dtype, cuda_graphs=graphs, max_batch=max_batch,
        capture=_NoCapture() if device == "cpu" and graphs else None,
    )  # fmt: skip
    return Step(runner, loader, config, context)


def word_tokenizer(vocab_size: int) -> Any:
    """A tokenizer with one word per id, for engines whose text is not read."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1", eos_token="w2")
