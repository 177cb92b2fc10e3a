"""Log-mel features of 16 kHz audio, as Whisper takes them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

RATE = 16_000  # samples per second
HOP = 160  # samples from frame to frame: 10 ms
SPAN = 400  # samples that a frame sees, around its centre at HOP * frame
HALF = SPAN // 2
BINS = HALF + 1  # frequencies of a frame's spectrum, 40 Hz apart
WINDOW_FRAMES = 3_000
WINDOW_SAMPLES = WINDOW_FRAMES * HOP
FLOOR = -10.0  # log10 of the least power: silence
RANGE = 8.0  # what lies further below the peak is raised to there: 80 dB
BLOCK = 512  # frames computed at a time: their buffers stay in the cache


@lru_cache(maxsize=8)
def mel_filters(mels: int) -> np.ndarray:
    """The Slaney mel filter bank, fp64 [201 frequencies, mels], from 0 to 8,000 Hz.

    The mel scale is linear to 1,000 Hz (15 mels) and logarithmic above (27 mels for a factor of 6.4). Filter k is a triangle
    over three neighbours of mels + 2 points that are evenly spaced in mels; its area in Hz is one. Source: M. Slaney,
    "Auditory Toolbox", 1998.

    Raises ValueError for mels below 1.
    """
    if mels < 1:
        raise ValueError(f"{mels} mels: there must be at least one")
    points = _hertz(np.linspace(0.0, _mel(RATE / 2), mels + 2))
    low, middle, high = points[:-2], points[1:-1], points[2:]
    frequencies = np.linspace(0.0, RATE / 2, BINS)[:, None]
    rising = (frequencies - low) / (middle - low)
    falling = (high - frequencies) / (high - middle)
    filters = np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (high - low))
    filters.setflags(write=False)  # shared by every caller
    return filters


def _mel(hertz: float) -> float:
    return hertz * 3 / 200 if hertz < 1_000 else 15 + 27 * float(np.log(hertz / 1_000) / np.log(6.4))


def _hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1_000 * np.exp(np.log(6.4) / 27 * (np.maximum(mel, 15) - 15)))


class LogMel:
    """Log-mel features with `mels` filters (80 or 128 for Whisper). Holds constants only: any thread may call it.

    The spectrum is computed in fp32 by torch, as transformers' WhisperFeatureExtractor does. In loud frames fp32 moves quiet
    filters by up to 3e-5 from the exact result, so another transform would differ from that extractor by more than 1e-5.
    """

    def __init__(self, mels: int):
        import torch

        self.mels = mels
        self._filters = torch.from_numpy(mel_filters(mels).astype(np.float32))
        self._hann = torch.hann_window(SPAN)

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Features fp32 [samples // 160, mels] of fp32 [samples] that stand alone; both ends are mirrored."""
        if len(samples) < HOP:
            return np.empty((0, self.mels), np.float32)
        power = self.log_power(np.pad(samples.astype(np.float32, copy=False), HALF, mode="reflect"))[
            : len(samples) // HOP
        ]
        return self.scale(power, float(power.max()))

    def log_power(self, samples: np.ndarray) -> np.ndarray:
        """log10 of the power in each filter, at least -10, fp32 [frames, mels].

        samples: fp32 [HOP * (frames - 1) + SPAN or more]. Frame k sees SPAN of them from HOP * k on.
        """
        import torch

        frames = (len(samples) - SPAN) // HOP + 1
        if frames < 1:
            return np.empty((0, self.mels), np.float32)
        with torch.inference_mode():
            source = torch.from_numpy(np.require(samples, np.float32, ["C", "W"]))
            framed = source.as_strided((frames, SPAN), (HOP, 1))
            out = torch.empty(frames, self.mels)
            windowed, power = torch.empty(min(BLOCK, frames), SPAN), torch.zeros(BLOCK, BINS)
            for begin in range(0, frames, BLOCK):
                count = min(BLOCK, frames - begin)
                self._block(framed[begin : begin + count], windowed[:count], power, out[begin : begin + count])
            return out.clamp_(min=10**FLOOR).log10_().numpy()

    def _block(self, framed: Any, windowed: Any, power: Any, out: Any) -> None:
        import torch

        torch.mul(framed, self._hann, out=windowed)
        parts = torch.view_as_real(torch.fft.rfft(windowed)).square_()
        torch.add(parts[..., 0], parts[..., 1], out=power[: len(framed)])
        # Always of as many rows: a product of few may sum in another order (MKL's of 10 rows does with AVX-512), and a
        # frame's bits would hang on the frames beside it.
        out.copy_(torch.mm(power, self._filters)[: len(framed)])

    @staticmethod
    def scale(log_power: np.ndarray, peak: float) -> np.ndarray:
        """Features of log powers, changed in place: raised to 80 dB below the peak, then moved and scaled."""
        np.maximum(log_power, np.float32(peak) - np.float32(RANGE), out=log_power)
        log_power += np.float32(4)
        log_power /= np.float32(4)
        return log_power
