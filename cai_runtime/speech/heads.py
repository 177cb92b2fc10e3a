"""Chooses the heads of the decoder's cross-attention by which words are timed. Light to import."""

from __future__ import annotations

from collections.abc import Sequence

MEASURED_LAYERS = 6  # of the deepest decoder whose heads were measured, whisper-base


def word_heads(layers: int, heads: int, named: Sequence[Sequence[int]] | None = None) -> tuple[tuple[int, int], ...]:
    """(layer, head) of the cross-attention to align words by, for a decoder of `layers` layers of `heads` heads.

    A single head attends up to 0.4 s before or behind the sound, and the few that a checkpoint names (`named`, its
    generation_config's alignment_heads) share a lag: +0.11 s for whisper-tiny.en, -0.05 s for whisper-base. Over all heads
    but those of the lowest quarter of layers, which follow no word, the lags cancel to 0.02 s. So these are taken in
    decoders of up to `MEASURED_LAYERS` layers; in deeper ones the named heads, or without them those of the upper half.
    """
    if layers > MEASURED_LAYERS and named:
        return tuple((int(layer), int(head)) for layer, head in named)
    lowest = max(1, layers // 4) if layers <= MEASURED_LAYERS else layers // 2
    return tuple((layer, head) for layer in range(min(lowest, layers - 1), layers) for head in range(heads))
