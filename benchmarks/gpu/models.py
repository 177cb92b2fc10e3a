"""Models of random weights, drawn on the device: a step of one as the engine runs it, without a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.context import INT4_GROUP, KEEP, PAGE_SIZE


class _RandomCheckpoint:
    """What of a checkpoint a model definition asks for beside weights."""

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
    """A `WeightLoader` that draws what it is asked for: the layers' linears in one kind and store, head and embedding dense
    bf16, norms of ones. Equal arguments draw equal weights, whatever the backend and dtype.

    It has two attributes more: `layer_bytes`, and `head_bytes`, of the head alone."""
    import torch

    from cai_runtime.bench.factors import Factorization, RandomWeights
    from cai_runtime.layers.linear import WeightLoader

    draw = RandomWeights(device, group=INT4_GROUP)

    class RandomLoader(WeightLoader):
        layer_bytes = head_bytes = 0

        def weights(self, name: str, shape: tuple[int, int], *, bias: bool = True) -> Any:
            out, inp = shape
            end = "layers" not in name
            w = draw.linear(inp, out, Factorization("dense" if end else kind, KEEP), "bf16" if end else store)
            if end:
                self.head_bytes = w.nbytes  # the embedding's twin: a step reads one row of that
            else:
                self.layer_bytes += w.nbytes
            return w

        def vector(self, name: str, size: int, dtype: Any = None) -> Any:
            return torch.ones(size, dtype=dtype or self.activation_dtype, device=self.device)

    return RandomLoader(_RandomCheckpoint(config), torch.device(device), dtype, backend)  # type: ignore[arg-type]


@dataclass
class Step:
    """An open model whose sequences stand at `context` positions, about to decode one token each."""

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
        """One sequence that begins with `tokens` tokens. It takes as many of all pages as it needs."""
        from cai_runtime.engine.runner import ScheduledSequence

        ids = [(7919 * i + 1) % self.config["vocab_size"] for i in range(tokens)]
        return [ScheduledSequence(ids, 0, list(range(-(-tokens // PAGE_SIZE))), True)]

    def floor_bytes(self, batch: int) -> int:
        """What a step must read: the layers' weights, the head, the keys and values of every sequence."""
        heads, layers = self.config["num_key_value_heads"], self.config["num_hidden_layers"]
        dim = self.config["hidden_size"] // self.config["num_attention_heads"]
        return self.loader.layer_bytes + self.loader.head_bytes + batch * self.context * 2 * 2 * heads * dim * layers

    def graph(self, sequences: list[Any]) -> Callable[[], Any]:
        """The recorded pass of a decode step, its inputs written; returns the logits on the device."""
        return self.runner.recorded(sequences)

    def without_graphs(self, sequences: list[Any]) -> Any:
        """A step's logits by plain launches."""
        graphs, self.runner._graphs = self.runner._graphs, None
        try:
            return self.runner.run(sequences)
        finally:
            self.runner._graphs = graphs

    def record_again(self, sequences: list[Any], then: Callable[[], Any]) -> Any:
        """`then` with graphs that are recorded anew, as options of launches need it; afterwards all is as before."""
        graphs = self.runner._graphs
        recorded, graphs._recorded = graphs._recorded, {}
        try:
            return then()
        finally:
            graphs._recorded = recorded


class _NoCapture:
    """In the place of CUDA graphs where there is no GPU: the pass runs each time, into one place."""

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
    """dtype: of the activations and the cache (None: bf16). least_pages: of the cache, where prompts need more."""
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
    """A tokenizer with a word for each id, for engines whose text nobody reads."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1", eos_token="w2")
