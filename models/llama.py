"""Llama (Touvron et al. 2023; Grattafiori et al. 2024), and the models that share its architecture, such as SmolLM2.

Pre-norm blocks of grouped-query attention with rotary embedding and a SwiGLU MLP; biases, a tied head and an explicit
head_dim as config.json says. Dense and slim checkpoints load alike: each projection is whatever kind it is stored as.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cai_runtime.errors import InvalidConfigError, UnsupportedModelError
from cai_runtime.kernels.attention import HeadLayout
from cai_runtime.kernels.batch import AttentionBatch
from cai_runtime.kernels.norm import RmsNorm
from cai_runtime.kernels.program import Axis, Input
from cai_runtime.kernels.slim_linear import PreparedLinear
from cai_runtime.layers.linear import WeightLoader
from cai_runtime.layers.ops import Attention, Compiled, Ops, make_ops
from cai_runtime.layers.rotary import RopeConfig, cos_sin_table
from cai_runtime.models.config import flag, number, whole


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
    attention_bias: bool  # of all four projections
    mlp_bias: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Raises InvalidConfigError for a missing or impossible value, UnsupportedModelError for an option not here."""
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise UnsupportedModelError(f"llama with hidden_act {activation!r}: only silu is supported")
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
            layers=whole(config, "num_hidden_layers"),
            heads=HeadLayout(query_heads, kv_heads, head_dim, rope.rotary_dim),
            norm_eps=number(config, "rms_norm_eps", 1e-6),
            rope=rope,
            tied=flag(config, "tie_word_embeddings"),
            attention_bias=flag(config, "attention_bias"),
            mlp_bias=flag(config, "mlp_bias"),
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
    attention: Attention | None = None  # given by allocate_cache


class Llama:
    """The model over a paged KV cache. `forward` takes the flattened tokens of all sequences of a step."""

    def __init__(self, loader: WeightLoader, on_layer: Callable[[], object] = lambda: None):
        self.config = c = LlamaConfig.from_config(loader.checkpoint.config)
        self.device, self.dtype = loader.device, loader.activation_dtype
        self.vocab_size, self.max_context = c.vocab_size, c.rope.context
        self.ops: Ops = make_ops(loader.backend, loader.device, loader.arena)
        h = c.heads
        q, kv, hidden, wide = h.query_width, h.kv_heads * h.head_dim, c.hidden_size, c.intermediate_size
        ends = ("model.embed_tokens", "lm_head")
        embedding, head = loader.embedding_and_head(*ends, (c.vocab_size, hidden), tied=c.tied)
        self.embed, self.head = self.ops.embedding_and_head(embedding, head, self.dtype)
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
                        bias=c.attention_bias,
                    ),
                    loader.linear([at + "o_proj"], [(hidden, q)], bias=c.attention_bias),
                    RmsNorm(loader.vector(f"model.layers.{i}.post_attention_layernorm.weight", hidden), c.norm_eps),
                    loader.linear(
                        [mlp + "gate_proj", mlp + "up_proj"], [(wide, hidden), (wide, hidden)], bias=c.mlp_bias
                    ),
                    loader.linear([mlp + "down_proj"], [(hidden, wide)], bias=c.mlp_bias),
                )
            )
            on_layer()
        self.norm = loader.vector("model.norm.weight", hidden)
        self.scale = 1.0 / math.sqrt(h.head_dim)
        self.cos_sin: torch.Tensor | None = None  # given by allocate_cache
        self.compiled_forward: Compiled | None = None
        self.compiled_step: Compiled | None = None

    def page_bytes(self, page_size: int, dtype: torch.dtype) -> int:
        """Bytes that one page takes in the caches of all layers."""
        return self.config.layers * self.ops.page_bytes(page_size, self.config.heads, dtype)

    def allocate_cache(self, pages: int, page_size: int, dtype: torch.dtype, max_context: int) -> None:
        """Give every layer its pages, and the rotary table as many positions as they hold. Call once, before `forward`."""
        self.cos_sin = cos_sin_table(self.config.rope, min(max_context, pages * page_size)).to(self.device)
        for block in self.blocks:
            block.attention = self.ops.attention(self.config.heads, pages, page_size, dtype)
        ids, wanted = Input(Axis.TOKENS, 1, torch.int32), Input(Axis.WANTED, 1, torch.int32)
        self.compiled_forward = self.ops.compile(lambda ids: self.hidden_states(ids, None), {"ids": ids})
        self.compiled_step = self.ops.compile(
            lambda ids, wanted: self.wanted_logits(ids, wanted, None), {"ids": ids, "wanted": wanted}
        )

    def forward(self, ids: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """ids int32 [T] -> hidden states [T, hidden], after the last norm."""
        if self.compiled_forward is not None:
            return self.compiled_forward(batch, ids=ids)
        return self.hidden_states(ids, batch)

    def step(self, ids: torch.Tensor, wanted: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """ids int32 [T], wanted int32 [N] rows of them -> fp32 [N, vocabulary]."""
        if self.compiled_step is not None:
            return self.compiled_step(batch, ids=ids, wanted=wanted)
        return self.logits(self.ops.take_rows(self.forward(ids, batch), wanted))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden] -> fp32 [N, vocabulary]."""
        return self.head(hidden).float()

    # The same on tensors, or on Values of a pass being recorded, which have no batch yet.

    def hidden_states(self, ids: Any, batch: Any) -> Any:
        return self.ops.rms_norm(self._blocks(self.embed(ids), batch), self.norm, self.config.norm_eps)

    def wanted_logits(self, ids: Any, wanted: Any, batch: Any) -> Any:
        # The last norm is of rows: those alone whose logits are wanted need it.
        rows = self.ops.take_rows(self._blocks(self.embed(ids), batch), wanted)
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
