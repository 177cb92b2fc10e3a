"""Whisper (Radford et al. 2022, "Robust speech recognition via large-scale weak supervision"): audio to text.

An encoder reads a window of log-mel frames once: two convolutions, learned positions, pre-norm blocks whose attention sees
the whole window. The decoder's blocks attend to the text so far, over pages, and to the encoder's output, whose keys and
values lie in pages of their own: computed once for a window, shared by all that is decoded from it. All sizes, one language
or many, 80 or 128 mels, fewer decoder than encoder layers (turbo). Linears are dense or slim, as they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cai_runtime.errors import InvalidConfigError, KernelError, UnsupportedModelError
from cai_runtime.kernels.attention import HeadLayout
from cai_runtime.kernels.batch import FULL, AttentionBatch, GivenEmbeddings
from cai_runtime.kernels.cache_groups import CacheGroup
from cai_runtime.kernels.norm import LayerNorm
from cai_runtime.kernels.program import Axis, Input
from cai_runtime.kernels.slim_linear import PreparedLinear
from cai_runtime.layers.linear import WeightLoader, stored_dtype
from cai_runtime.layers.ops import Attention, Compiled, Ops, make_ops
from cai_runtime.models.config import MOST_LAYERS, flag, whole

ENCODER = "encoder"  # the cache group of the encoder's output
ENCODER_PAGE = 64  # positions of a page of it
KERNEL = 3  # frames that a convolution sees
NORM_EPS = 1e-5  # torch's default, which Whisper uses


@dataclass(frozen=True)
class WhisperConfig:
    """What of config.json determines the computation.

    rows: positions of the encoder's output, half as many as frames of a window. positions: of the decoder.
    """

    vocab_size: int
    hidden_size: int
    mels: int
    rows: int
    positions: int
    encoder_layers: int
    decoder_layers: int
    encoder_heads: HeadLayout
    decoder_heads: HeadLayout
    encoder_wide: int
    decoder_wide: int
    tied: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> WhisperConfig:
        """Raises InvalidConfigError for a missing or impossible value, UnsupportedModelError for an option not here."""
        activation = config.get("activation_function", "gelu")
        if activation != "gelu":
            raise UnsupportedModelError(f"activation_function {activation!r}: only gelu is supported")
        hidden = whole(config, "d_model")

        def heads(part: str) -> HeadLayout:
            count = whole(config, f"{part}_attention_heads")
            if hidden % count:
                raise InvalidConfigError(f"d_model {hidden} is no multiple of {count} heads", file="config.json")
            return HeadLayout(count, count, hidden // count, rotary_dim=0)

        return cls(
            vocab_size=whole(config, "vocab_size"),
            hidden_size=hidden,
            mels=whole(config, "num_mel_bins", 80),
            rows=whole(config, "max_source_positions", 1500),
            positions=whole(config, "max_target_positions", 448),
            encoder_layers=whole(config, "encoder_layers", most=MOST_LAYERS),
            decoder_layers=whole(config, "decoder_layers", most=MOST_LAYERS),
            encoder_heads=heads("encoder"),
            decoder_heads=heads("decoder"),
            encoder_wide=whole(config, "encoder_ffn_dim"),
            decoder_wide=whole(config, "decoder_ffn_dim"),
            tied=flag(config, "tie_word_embeddings", True),
        )


@dataclass
class SelfAttention:
    """Norm and linears of attention over a block's own input."""

    norm: LayerNorm
    qkv: PreparedLinear
    output: PreparedLinear


@dataclass
class Mlp:
    norm: LayerNorm
    up: PreparedLinear
    down: PreparedLinear


@dataclass
class EncoderBlock:
    attention: SelfAttention
    mlp: Mlp


@dataclass
class DecoderBlock:
    """One layer of the decoder. paged, crossed: its attention over the text and over the encoder's output, given by
    `allocate`."""

    attention: SelfAttention
    cross_norm: LayerNorm
    cross_query: PreparedLinear
    cross_kv: PreparedLinear
    cross_output: PreparedLinear
    mlp: Mlp
    paged: Attention | None = None
    crossed: Any = None


class Whisper:
    """The model over its caches. `encode` fills pages of the encoder's output; `forward` takes the flattened tokens of all
    sequences of a step, each of which has such pages."""

    able = frozenset({"encoder", "cross_attention"})

    def __init__(self, loader: WeightLoader, on_layer: Callable[[], object] = lambda: None):
        self.config = c = WhisperConfig.from_config(loader.checkpoint.config)
        self.device, self.dtype = loader.device, loader.activation_dtype
        self.vocab_size, self.max_context = c.vocab_size, c.positions
        self.ops: Ops = make_ops(loader.backend, loader.device, loader.arena)
        parts, inner = _Parts(loader, c.hidden_size), _Parts(loader, c.hidden_size, encoder=True)
        ends = ("model.decoder.embed_tokens", "proj_out")
        embedding, head = loader.embedding_and_head(*ends, (c.vocab_size, c.hidden_size), tied=c.tied)
        rounds = loader.rounds()
        self.embed, self.head = self.ops.embedding_and_head(embedding, head, self.dtype, int8_activations=rounds)
        for name in ends:
            loader.release(name)
        del embedding, head
        first, second = "model.encoder.conv1", "model.encoder.conv2"
        self.conv1 = self.ops.convolution(
            loader.tensor(f"{first}.weight", (c.hidden_size, c.mels, KERNEL)),
            loader.vector(f"{first}.bias", c.hidden_size), 1, 2 * c.rows,
        )  # fmt: skip
        self.conv2 = self.ops.convolution(
            loader.tensor(f"{second}.weight", (c.hidden_size, c.hidden_size, KERNEL)),
            loader.vector(f"{second}.bias", c.hidden_size), 2, 2 * c.rows,
        )  # fmt: skip
        self.encoder_positions = loader.tensor("model.encoder.embed_positions.weight", (c.rows, c.hidden_size))
        self.positions = loader.tensor("model.decoder.embed_positions.weight", (c.positions, c.hidden_size))
        self.encoder: list[EncoderBlock] = []
        for i in range(c.encoder_layers):
            at = f"model.encoder.layers.{i}."
            self.encoder.append(EncoderBlock(inner.attention(at), inner.mlp(at, c.encoder_wide)))
            on_layer()
        self.encoder_norm = parts.norm("model.encoder.layer_norm")
        self.decoder: list[DecoderBlock] = []
        for i in range(c.decoder_layers):
            at = f"model.decoder.layers.{i}."
            cross = f"{at}encoder_attn."
            self.decoder.append(
                DecoderBlock(
                    parts.attention(at),
                    parts.norm(f"{at}encoder_attn_layer_norm"),
                    parts.linear(f"{cross}q_proj"),
                    parts.linear(f"{cross}k_proj", f"{cross}v_proj"),
                    parts.linear(f"{cross}out_proj"),
                    parts.mlp(at, c.decoder_wide),
                )
            )
            on_layer()
        self.norm = parts.norm("model.decoder.layer_norm")
        self.encoder_scale = 1.0 / math.sqrt(c.encoder_heads.head_dim)
        self.scale = 1.0 / math.sqrt(c.decoder_heads.head_dim)
        self.encoder_attention = self.ops.encoder_attention(c.encoder_heads, c.rows)
        # A step reads the keys and values of a whole window: from weights of 16 bits, 16 bits are enough for them.
        cross_dtype = loader.cache_dtype
        if cross_dtype is None or cross_dtype == torch.int8:
            cross_dtype = stored_dtype(loader.checkpoint.config) if loader.dtype is None else self.dtype
        self._cross_dtype: torch.dtype = cross_dtype
        self.cos_sin: torch.Tensor | None = None
        self.compiled_step: Compiled | None = None
        self.compiled_encode: Compiled | None = None

    @property
    def features_shape(self) -> tuple[int, int]:
        """(frames, mels) of a window."""
        return 2 * self.config.rows, self.config.mels

    @property
    def pages_of_window(self) -> int:
        return -(-self.config.rows // ENCODER_PAGE)

    # Caches

    def cache_groups(self, page_size: int, dtype: torch.dtype) -> tuple[CacheGroup, ...]:
        """The text's pages, and those of the encoder's output."""
        c, layers = self.config, self.config.decoder_layers
        own = self.ops.page_bytes(page_size, c.decoder_heads, dtype)
        cross = self.ops.page_bytes(ENCODER_PAGE, c.decoder_heads, self._cross_dtype)
        pages = self.pages_of_window
        return (
            CacheGroup(FULL, page_bytes=layers * own, page_size=page_size),
            CacheGroup(
                ENCODER, "encoder", layers * cross, page_size=ENCODER_PAGE, reuse="content", most_pages=pages
            ),
        )  # fmt: skip

    def allocate(self, counts: Mapping[str, int], page_size: int, dtype: torch.dtype, max_context: int) -> None:
        """Give every layer of the decoder its pages. Call once, before `forward`."""
        c = self.config
        heads = c.decoder_heads
        self.cos_sin = torch.zeros(max_context, 0, dtype=torch.float32, device=self.device)  # nothing is rotated
        for block in self.decoder:
            own = self.ops.kv_cache(heads, counts[FULL], page_size, dtype)
            block.paged = self.ops.attention(heads, own)
            cross = self.ops.kv_cache(heads, counts[ENCODER], ENCODER_PAGE, self._cross_dtype)
            block.crossed = self.ops.cross_attention(heads, cross, c.rows, ENCODER)
        number, wanted = Input(Axis.TOKENS, 1, torch.int32), Input(Axis.WANTED, 1, torch.int32)
        self.compiled_step = self.ops.compile(
            lambda ids, positions, wanted: self._wanted_logits(ids, positions, wanted, None),
            {"ids": number, "positions": number, "wanted": wanted},
        )
        frames = Input(Axis.ENCODER, 2 * c.mels)
        pages = Input(Axis.SEQUENCES, self.pages_of_window, torch.int32)
        self.compiled_encode = self.ops.compile(self._encode, {"frames": frames, "pages": pages})

    def copy_pages(self, group: str, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy pages of a group, by number, in all layers. No target is a source too."""
        from_pages, to_pages = (torch.tensor(p, dtype=torch.int64, device=self.device) for p in (sources, targets))
        for block in self.decoder:
            attention = block.paged if group == FULL else block.crossed
            assert attention is not None
            attention.cache.copy_pages(from_pages, to_pages)

    # The encoder

    def encode(self, features: Sequence[np.ndarray], pages: np.ndarray) -> None:
        """Compute the encoder's output of windows and put its keys and values into pages of the group "encoder".

        features: of each window fp32 [frames, mels], see `features_shape`. pages: int32 [windows, pages of a window].
        Raises KernelError for features of another shape."""
        for window in features:
            if window.shape != self.features_shape:
                raise KernelError(
                    f"features have shape {list(window.shape)}; this model takes {list(self.features_shape)}"
                )
        table = torch.from_numpy(np.ascontiguousarray(pages, np.int32)).to(self.device)
        frames = torch.from_numpy(np.ascontiguousarray(np.concatenate(features), np.float32))
        frames = frames.view(-1, 2 * self.config.mels).to(self.device, self.dtype)
        (self.compiled_encode or self._encode)(frames=frames, pages=table)

    # The same on tensors, or on Values of a pass being recorded. Two frames are a row of `frames`.

    def _encode(self, frames: Any, pages: Any) -> Any:
        x, written = self._encoded(frames), None
        for block in self.decoder:
            written = block.crossed.write(block.cross_kv(x), pages)
        return written

    def _encoded(self, frames: Any) -> Any:
        """[windows * rows, hidden], after the last norm."""
        ops = self.ops
        x = ops.add_rows(ops.gelu(self.conv2(self.conv1(frames), gelu=True)), self.encoder_positions)
        for block in self.encoder:
            mixed = self.encoder_attention(block.attention.qkv(x, norm=block.attention.norm), self.encoder_scale)
            x = block.attention.output(mixed, x)
            x = _through(block.mlp, x)
        last = self.encoder_norm
        return ops.layer_norm(x, last.weight, last.bias, last.eps)

    # The decoder

    def forward(self, ids: torch.Tensor, batch: AttentionBatch, given: GivenEmbeddings | None = None) -> torch.Tensor:
        """ids int32 [T] -> hidden states [T, hidden], after the last norm."""
        self._refuse(given)
        return self._normed(self._blocks(ids, batch.positions, batch))

    def step(
        self, ids: torch.Tensor, wanted: torch.Tensor, batch: AttentionBatch, given: GivenEmbeddings | None = None
    ) -> torch.Tensor:
        """ids int32 [T], wanted int32 [N] rows of them -> fp32 [N, vocabulary]."""
        self._refuse(given)
        if self.compiled_step is not None:
            return self.compiled_step(batch, ids=ids, positions=batch.positions, wanted=wanted)
        return self._wanted_logits(ids, batch.positions, wanted, batch).float()

    def forward_attending(
        self, ids: torch.Tensor, batch: AttentionBatch, layers: frozenset[int]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """`forward`, and the queries [T, hidden] of the cross-attention of some layers."""
        queries: dict[int, torch.Tensor] = {}
        x = self._blocks(ids, batch.positions, batch, lambda i, q: queries.update({i: q}) if i in layers else None)
        return self._normed(x), queries

    def attention_weights(
        self, layer: int, heads: Sequence[int], queries: torch.Tensor, pages: torch.Tensor
    ) -> np.ndarray:
        """Cross-attention of heads of a layer: fp32 [heads, T, rows], summing to 1 over the rows. queries: as from
        `forward_attending`, of tokens that attend to the window in `pages`, int32 [pages of a window]."""
        weights = self.decoder[layer].crossed.weights(queries, pages, list(heads), self.scale)
        return np.asarray(weights.cpu() if isinstance(weights, torch.Tensor) else weights, np.float32)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden] -> fp32 [N, vocabulary]."""
        return self.head(hidden).float()

    def _refuse(self, given: GivenEmbeddings | None) -> None:
        if given is not None:
            raise KernelError("Whisper's decoder takes tokens alone, no rows in place of embeddings")

    def _normed(self, x: Any) -> Any:
        return self.ops.layer_norm(x, self.norm.weight, self.norm.bias, self.norm.eps)

    def _wanted_logits(self, ids: Any, positions: Any, wanted: Any, batch: Any) -> Any:
        # The last norm is of rows: those alone whose logits are wanted need it.
        return self.head(self._normed(self.ops.take_rows(self._blocks(ids, positions, batch), wanted)))

    def _blocks(self, ids: Any, positions: Any, batch: Any, see: Callable[[int, Any], object] | None = None) -> Any:
        assert self.cos_sin is not None
        x = self.ops.add_rows(self.embed(ids), self.positions, positions)
        for i, block in enumerate(self.decoder):
            assert block.paged is not None
            qkv = block.attention.qkv(x, norm=block.attention.norm)
            x = block.attention.output(block.paged(qkv, batch, self.cos_sin, self.scale), x)
            query = block.cross_query(x, norm=block.cross_norm)
            if see is not None:
                see(i, query)
            x = block.cross_output(block.crossed(query, batch, self.scale), x)
            x = _through(block.mlp, x)
        return x


def _through(mlp: Mlp, x: Any) -> Any:
    return mlp.down(mlp.up(x, norm=mlp.norm), x, gelu=True)


class _Parts:
    """Reads the parts of blocks, whose names are the same in encoder and decoder."""

    def __init__(self, loader: WeightLoader, hidden: int, *, encoder: bool = False):
        self._loader, self._hidden, self._encoder = loader, hidden, encoder

    def norm(self, name: str) -> LayerNorm:
        weight, bias = (self._loader.vector(f"{name}.{part}", self._hidden) for part in ("weight", "bias"))
        return LayerNorm(weight, bias, NORM_EPS)

    def linear(self, *names: str) -> PreparedLinear:
        """Projections from and to the hidden size, with the biases that they have (keys have none)."""
        return self._linear(names, [(self._hidden, self._hidden)] * len(names))

    def attention(self, at: str) -> SelfAttention:
        own = f"{at}self_attn."
        qkv = self.linear(*(f"{own}{part}_proj" for part in "qkv"))
        return SelfAttention(self.norm(f"{at}self_attn_layer_norm"), qkv, self.linear(f"{own}out_proj"))

    def mlp(self, at: str, wide: int) -> Mlp:
        up = self._linear([f"{at}fc1"], [(wide, self._hidden)])
        down = self._linear([f"{at}fc2"], [(self._hidden, wide)])
        return Mlp(self.norm(f"{at}final_layer_norm"), up, down)

    def _linear(self, names: Sequence[str], shapes: Sequence[tuple[int, int]]) -> PreparedLinear:
        return self._loader.linear(names, shapes, encoder=self._encoder)
