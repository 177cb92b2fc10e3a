"""Llama (Touvron et al. 2023; Grattafiori et al. 2024), and the models that share its architecture, such as SmolLM2.

Pre-norm blocks of grouped-query attention with rotary embedding and a SwiGLU MLP; biases, a tied head and an explicit
head_dim as config.json says. Dense and slim checkpoints load alike: each projection is whatever kind it is stored as.
Families of the same blocks whose layers may see a sliding window are subclasses: they read config.json in their own way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cai_runtime.errors import InvalidConfigError, KernelError, UnsupportedModelError
from cai_runtime.kernels.attention import HeadLayout, HeadNorms
from cai_runtime.kernels.batch import FULL, WINDOW, AttentionBatch, GivenEmbeddings
from cai_runtime.kernels.cache_groups import CacheGroup, pools
from cai_runtime.kernels.norm import RmsNorm
from cai_runtime.kernels.program import Axis, Input
from cai_runtime.kernels.slim_linear import PreparedLinear
from cai_runtime.layers.linear import WeightLoader
from cai_runtime.layers.ops import Attention, Compiled, Ops, make_ops
from cai_runtime.layers.rotary import RopeConfig, cos_sin_table
from cai_runtime.models.config import MOST_LAYERS, flag, number, whole
from cai_runtime.models.registry import has_head


@dataclass(frozen=True)
class LlamaConfig:
    """What of config.json determines the computation."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: HeadLayout
    norm_eps: float
    rope: RopeConfig
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    windows: tuple[
        int | None, ...
    ]  # of each layer: positions of its sliding window; None: it sees all. One size at most
    head_norms: bool = False  # of queries and keys, see `HeadNorms`

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Raises InvalidConfigError for a missing or impossible value, UnsupportedModelError for an option not here."""
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise UnsupportedModelError(f"hidden_act {activation!r}: only silu is supported")
        hidden = whole(config, "hidden_size")
        query_heads = whole(config, "num_attention_heads")
        kv_heads = whole(config, "num_key_value_heads", query_heads)
        head_dim = whole(config, "head_dim", hidden // query_heads)
        if query_heads % kv_heads or head_dim < 2:
            raise InvalidConfigError(
                f"{query_heads} query heads, {kv_heads} key/value heads and head_dim {head_dim} do not fit",
                file="config.json",
            )
        rope = RopeConfig.from_config(config, head_dim, partial=False)
        return cls(
            vocab_size=whole(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=whole(config, "intermediate_size"),
            layers=(layers := whole(config, "num_hidden_layers", most=MOST_LAYERS)),
            heads=HeadLayout(query_heads, kv_heads, head_dim, rope.rotary_dim),
            norm_eps=number(config, "rms_norm_eps", 1e-6, least=0),
            rope=rope,
            tied=flag(config, "tie_word_embeddings"),
            qkv_bias=flag(config, "attention_bias"),
            output_bias=flag(config, "attention_bias"),
            mlp_bias=flag(config, "mlp_bias"),
            windows=(None,) * layers,
        )


@dataclass
class Block:
    """One layer: its linears grouped by the input they share, its norms, its attention (with the layer's cache)."""

    input_norm: RmsNorm
    qkv: PreparedLinear
    output: PreparedLinear
    post_norm: RmsNorm
    gate_up: PreparedLinear
    down: PreparedLinear
    window: int | None  # see `HeadLayout`
    head_norms: HeadNorms | None
    attention: Attention | None = None  # given by `allocate`

    @property
    def group(self) -> str:
        """The cache group of the layer."""
        return FULL if self.window is None else WINDOW


class Llama:
    """The model over a paged KV cache. `forward` takes the flattened tokens of all sequences of a step."""

    def __init__(self, loader: WeightLoader, on_layer: Callable[[], object] = lambda: None):
        self.config = c = self.read_config(loader.checkpoint.config)
        self.device, self.dtype = loader.device, loader.activation_dtype
        self.vocab_size, self.max_context = c.vocab_size, c.rope.context
        self.ops: Ops = make_ops(loader.backend, loader.device, loader.arena)
        h = c.heads
        q, kv, hidden, wide = h.query_width, h.kv_heads * h.head_dim, c.hidden_size, c.intermediate_size
        ends = ("model.embed_tokens", "lm_head")
        self.has_head = has_head(loader.checkpoint.config)
        if self.has_head:
            embedding, head = loader.embedding_and_head(*ends, (c.vocab_size, hidden), tied=c.tied)
        else:
            embedding, head = loader.weights(ends[0], (c.vocab_size, hidden), bias=False), None
        rounds = loader.rounds()
        self.embed, self.head = self.ops.embedding_and_head(embedding, head, self.dtype, int8_activations=rounds)
        for name in ends:
            loader.release(name)
        del embedding, head
        self.blocks: list[Block] = []
        for i in range(c.layers):
            at, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
            self.blocks.append(
                Block(
                    RmsNorm(loader.vector(f"model.layers.{i}.input_layernorm.weight", hidden), c.norm_eps),
                    loader.linear(
                        [at + "q_proj", at + "k_proj", at + "v_proj"],
                        [(q, hidden), (kv, hidden), (kv, hidden)],
                        bias=c.qkv_bias,
                    ),
                    loader.linear([at + "o_proj"], [(hidden, q)], bias=c.output_bias),
                    RmsNorm(loader.vector(f"model.layers.{i}.post_attention_layernorm.weight", hidden), c.norm_eps),
                    loader.linear(
                        [mlp + "gate_proj", mlp + "up_proj"], [(wide, hidden), (wide, hidden)], bias=c.mlp_bias
                    ),
                    loader.linear([mlp + "down_proj"], [(hidden, wide)], bias=c.mlp_bias),
                    c.windows[i],
                    self._head_norms(loader, at) if c.head_norms else None,
                )
            )
            on_layer()
        self.norm = loader.vector("model.norm.weight", hidden)
        self.scale = 1.0 / math.sqrt(h.head_dim)
        self.cos_sin: torch.Tensor | None = None  # given by `allocate`
        self.compiled_forward: Compiled | None = None
        self.compiled_step: Compiled | None = None
        self.compiled_rows: Compiled | None = None

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> LlamaConfig:
        """Raises as `LlamaConfig.from_config` does."""
        return LlamaConfig.from_config(config)

    def _head_norms(self, loader: WeightLoader, at: str) -> HeadNorms:
        """Of the layer whose attention's names begin with `at`."""
        size = self.config.heads.head_dim
        query, key = (loader.vector(f"{at}{part}_norm.weight", size) for part in "qk")
        return HeadNorms(torch.stack([query, key]), self.config.norm_eps)

    def _layers(self, group: str) -> list[Block]:
        return [block for block in self.blocks if block.group == group]

    def cache_groups(self, page_size: int, dtype: torch.dtype) -> tuple[CacheGroup, ...]:
        """One group of the layers that see all positions, one of those with a window, where there are any."""
        layer_bytes, groups = self.ops.page_bytes(page_size, self.config.heads, dtype), []
        for name in (FULL, WINDOW):
            layers = self._layers(name)
            if layers:
                kind: Any = "pages" if name == FULL else "window"
                size = len(layers) * layer_bytes
                groups.append(CacheGroup(name, kind, size, page_size, window=layers[0].window))
        return tuple(groups)

    def allocate(self, counts: Mapping[str, int], page_size: int, dtype: torch.dtype, max_context: int) -> None:
        """Give every layer its pages, and the rotary table `max_context` positions. Call once, before `forward`.

        counts: pages by cache group. Groups of one pool have equally many layers: one of each shares the same pages."""
        self.cos_sin = cos_sin_table(self.config.rope, max_context).to(self.device)
        for pool in pools(self.cache_groups(page_size, dtype)):
            for layers in zip(*(self._layers(group.name) for group in pool), strict=True):
                cache = self.ops.kv_cache(self.config.heads, counts[pool[0].name], page_size, dtype)
                for block in layers:
                    heads = replace(self.config.heads, window=block.window)
                    block.attention = self.ops.attention(heads, cache, group=block.group, norms=block.head_norms)
        ids, wanted = Input(Axis.TOKENS, 1, torch.int32), Input(Axis.WANTED, 1, torch.int32)
        x = Input(Axis.TOKENS, self.config.hidden_size)
        self.compiled_forward = self.ops.compile(lambda ids: self.hidden_states(self.embed(ids), None), {"ids": ids})
        if not self.has_head:
            return
        self.compiled_step = self.ops.compile(
            lambda ids, wanted: self.wanted_logits(self.embed(ids), wanted, None), {"ids": ids, "wanted": wanted}
        )
        self.compiled_rows = self.ops.compile(
            lambda x, wanted: self.wanted_logits(x, wanted, None), {"x": x, "wanted": wanted}
        )

    def copy_pages(self, group: str, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy pages of a cache group, by number, in all its layers. No target is a source too."""
        from_pages, to_pages = (torch.tensor(p, dtype=torch.int64, device=self.device) for p in (sources, targets))
        for block in self._layers(group):
            assert block.attention is not None
            block.attention.cache.copy_pages(from_pages, to_pages)

    def forward(self, ids: torch.Tensor, batch: AttentionBatch, given: GivenEmbeddings | None = None) -> torch.Tensor:
        """ids int32 [T] -> hidden states [T, hidden], after the last norm."""
        if given is not None:
            return self.hidden_states(self._embedded(ids, given), batch)
        if self.compiled_forward is not None:
            return self.compiled_forward(batch, ids=ids)
        return self.hidden_states(self.embed(ids), batch)

    def step(
        self, ids: torch.Tensor, wanted: torch.Tensor, batch: AttentionBatch, given: GivenEmbeddings | None = None
    ) -> torch.Tensor:
        """ids int32 [T], wanted int32 [N] rows of them -> fp32 [N, vocabulary]. Without a head N must be 0."""
        if given is not None and self.compiled_rows is not None:
            return self.compiled_rows(batch, x=self._embedded(ids, given), wanted=wanted)
        if given is None and self.compiled_step is not None:
            return self.compiled_step(batch, ids=ids, wanted=wanted)
        return self.logits(self.ops.take_rows(self.forward(ids, batch, given), wanted))

    def _embedded(self, ids: torch.Tensor, given: GivenEmbeddings) -> torch.Tensor:
        """[T, hidden]: the given rows, and the embeddings of the other tokens."""
        x: torch.Tensor = self.embed(ids)
        if given.rows.shape[1:] != x.shape[1:]:
            raise KernelError(f"given rows have shape {list(given.rows.shape)}; this model takes [n, {x.shape[1]}]")
        return x.index_copy_(0, given.index, given.rows.to(x.dtype))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden] -> fp32 [N, vocabulary]. Without a head raises KernelError."""
        if not self.has_head:
            raise KernelError("this model has no language-model head: it gives hidden states alone")
        return self.head(hidden).float()

    # The same on tensors, or on Values of a pass being recorded, which have no batch yet. x: [T, hidden].

    def hidden_states(self, x: Any, batch: Any) -> Any:
        return self.ops.rms_norm(self._blocks(x, batch), self.norm, self.config.norm_eps)

    def wanted_logits(self, x: Any, wanted: Any, batch: Any) -> Any:
        # The last norm is of rows: those alone whose logits are wanted need it.
        rows = self.ops.take_rows(self._blocks(x, batch), wanted)
        return self.head(self.ops.rms_norm(rows, self.norm, self.config.norm_eps))

    def _blocks(self, x: Any, batch: Any) -> Any:
        assert self.cos_sin is not None
        for block in self.blocks:
            assert block.attention is not None
            qkv = block.qkv(x, norm=block.input_norm)
            x = block.output(block.attention(qkv, batch, self.cos_sin, self.scale), x)
            gate_up = block.gate_up(x, norm=block.post_norm)
            x = block.down(gate_up, x, swiglu=True)
        return x
