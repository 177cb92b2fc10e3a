"""Silero's voice activity network at 16 kHz, on numpy: probability of speech for each 32 ms.

The weights are those in an ONNX file of the `silero-vad` package (MIT). The package is not imported, which would load torch
and set its number of threads, and the file's program is not run: the network is small enough for a definition of our own. It
is a short-time Fourier transform written as a convolution, four convolutions and an LSTM. So onnxruntime is not needed, a
probability has the same bits however the audio is cut, and one processor hears several hundred seconds a second.
(The package's safetensors file holds another network than its ONNX and TorchScript files, an earlier one.)
Architecture: https://github.com/snakers4/silero-vad (src/silero_vad/tinygrad_model.py); tested against its ONNX models.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cai_runtime.audio.mel import RATE
from cai_runtime.audio.onnx_weights import read_initializers
from cai_runtime.errors import AudioPackageError

FRAME = 512  # samples that one probability is of
CONTEXT = 64  # samples before them that the network sees, and that are mirrored behind them
BLOCK = 32  # frames computed together, always: so how audio is cut into blocks changes no bit of a probability
WIDTH = 128  # of the LSTM's state
WEIGHTS = "data/silero_vad_16k_op15.onnx"
_WINDOW, _HOP = 256, 128  # samples of the Fourier transform
_BINS = _WINDOW // 2 + 1
_STRIDES = (1, 2, 2, 1)  # of the convolutions
_CHANNELS = (_BINS, 128, 64, 64, 128)
_STFT, _RNN, _OUTPUT = "model.stft.forward_basis_buffer", "model.decoder.rnn", "model.decoder.decoder.2"
_CONVOLUTION = "model.encoder.{}.reparam_conv"
_SHAPES: dict[str, tuple[int, ...]] = {
    _STFT: (2 * _BINS, 1, _WINDOW),
    **{f"{_CONVOLUTION.format(k)}.weight": (_CHANNELS[k + 1], _CHANNELS[k], 3) for k in range(4)},
    **{f"{_CONVOLUTION.format(k)}.bias": (_CHANNELS[k + 1],) for k in range(4)},
    **{f"{_RNN}.weight_{side}": (4 * WIDTH, WIDTH) for side in ("ih", "hh")},
    **{f"{_RNN}.bias_{side}": (4 * WIDTH,) for side in ("ih", "hh")},
    f"{_OUTPUT}.weight": (1, WIDTH, 1),
    f"{_OUTPUT}.bias": (1,),
}


@dataclass(frozen=True)
class _Weights:
    """Weights laid out for products from the right, but `recurrent`. Rows of the LSTM's sigmoid gates are halved."""

    stft: np.ndarray  # [256, 258]
    convolutions: list[tuple[np.ndarray, np.ndarray]]  # [in * 3, out], [out]
    gates: np.ndarray  # [128, 512]
    recurrent: np.ndarray  # [512, 128]
    gate_bias: np.ndarray  # [512]
    output: np.ndarray  # [128]
    output_bias: np.ndarray  # [1]


class SileroNetwork:
    """The network over one stream of audio. Keeps its state of a few kilobytes; one thread at a time."""

    def __init__(self) -> None:
        """Raises AudioPackageError when the silero-vad package, or a version of it with these weights, is not installed."""
        self._weights = _weights()
        self.reset()

    def reset(self) -> None:
        """Begin another stream."""
        self._hidden = np.zeros(WIDTH, np.float32)
        self._cell = np.zeros(WIDTH, np.float32)
        self._context = np.zeros(CONTEXT, np.float32)

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Probability of speech of each frame, fp32 [BLOCK]. samples: fp32 [BLOCK * FRAME], the next of the stream."""
        frames = samples.reshape(BLOCK, FRAME)
        seen = np.empty((BLOCK, CONTEXT + FRAME + CONTEXT), np.float32)
        seen[0, :CONTEXT] = self._context
        seen[1:, :CONTEXT] = frames[:-1, -CONTEXT:]
        seen[:, CONTEXT:-CONTEXT] = frames
        seen[:, -CONTEXT:] = frames[:, -CONTEXT - 1 : -1][:, ::-1]
        self._context = frames[-1, -CONTEXT:].copy()
        return self._speech(self._encoded(seen))

    def _encoded(self, seen: np.ndarray) -> np.ndarray:
        """What the LSTM takes of each frame: fp32 [BLOCK, WIDTH]."""
        windows = np.lib.stride_tricks.sliding_window_view(seen, _WINDOW, axis=1)[:, ::_HOP]
        spectrum = windows @ self._weights.stft
        x = np.sqrt(np.square(spectrum[:, :, :_BINS]) + np.square(spectrum[:, :, _BINS:]))
        for (weight, bias), stride in zip(self._weights.convolutions, _STRIDES, strict=True):
            padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
            taps = np.lib.stride_tricks.sliding_window_view(padded, 3, axis=1)[
                :, ::stride
            ]  # [frames, times, channels, 3]
            x = np.maximum(taps.reshape(len(x), taps.shape[1], -1) @ weight + bias, 0.0)
        return x[:, 0]

    def _speech(self, x: np.ndarray) -> np.ndarray:
        w = self._weights
        gates = x @ w.gates + w.gate_bias
        hidden, cell = self._hidden, self._cell
        states = np.empty((BLOCK, WIDTH), np.float32)
        for frame in range(BLOCK):
            # The rows of sigmoid gates are halved: sigmoid(2 y) is (1 + tanh(y)) / 2, which never overflows.
            gate = np.tanh(gates[frame] + w.recurrent @ hidden)
            write, forget, read = (0.5 + 0.5 * gate[at * WIDTH : (at + 1) * WIDTH] for at in (0, 1, 3))
            cell = forget * cell + write * gate[2 * WIDTH : 3 * WIDTH]
            hidden = read * np.tanh(cell)
            states[frame] = hidden
        self._hidden, self._cell = hidden, cell
        logits = np.maximum(states, 0.0) @ w.output + w.output_bias
        return (0.5 + 0.5 * np.tanh(0.5 * logits)).astype(np.float32)


@functools.cache
def _weights() -> _Weights:
    """The weights of the installed package, read once."""
    path = _path()
    try:
        found = read_initializers(path)
    except (OSError, ValueError) as e:
        raise AudioPackageError(
            f"the weights of silero-vad can't be read: {e}: pip install --force-reinstall silero-vad ({path})",
            param="vad",
        ) from e
    for name, shape in _SHAPES.items():
        if name not in found or found[name].shape != shape:
            raise AudioPackageError(
                f"this version of silero-vad has another network (tensor {name}): pip install 'cai-runtime[vad]' ({path})",
                param="vad",
            )
    scale = np.repeat(np.array([0.5, 0.5, 1.0, 0.5], np.float32), WIDTH)
    kernels = [(found[f"{_CONVOLUTION.format(k)}.weight"], found[f"{_CONVOLUTION.format(k)}.bias"]) for k in range(4)]
    return _Weights(
        stft=np.ascontiguousarray(found[_STFT][:, 0].T),
        convolutions=[(np.ascontiguousarray(weight.reshape(len(bias), -1).T), bias) for weight, bias in kernels],
        gates=np.ascontiguousarray((found[f"{_RNN}.weight_ih"] * scale[:, None]).T),
        recurrent=found[f"{_RNN}.weight_hh"] * scale[:, None],
        gate_bias=(found[f"{_RNN}.bias_ih"] + found[f"{_RNN}.bias_hh"]) * scale,
        output=found[f"{_OUTPUT}.weight"].reshape(WIDTH),
        output_bias=found[f"{_OUTPUT}.bias"],
    )


def _path() -> Path:
    """The file of weights in the installed package. The package is found, not imported."""
    try:
        spec = importlib.util.find_spec("silero_vad")
    except (ImportError, ValueError):
        spec = None
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / WEIGHTS
        if path.is_file():
            return path
    missing = "its weights are not in the installed silero-vad" if spec else "silero-vad is not installed"
    raise AudioPackageError(f"voice activity detection: {missing}: pip install 'cai-runtime[vad]'", param="vad")


def silero_available() -> bool:
    """Whether the package with the weights is installed."""
    try:
        _path()
    except AudioPackageError:
        return False
    return True


assert RATE == 16_000, "the network hears 16 kHz alone"
