"""Windows of log-mel features over a stream of audio of any length, in flat memory."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from cai_runtime.audio.mel import FLOOR, HALF, HOP, RATE, SPAN, WINDOW_FRAMES, WINDOW_SAMPLES, LogMel


class _Queue:
    """Rows of an array, numbered from the first ever appended; the front can be dropped."""

    def __init__(self, shape: tuple[int, ...] = ()):
        self.begin = self.end = 0
        self._rows = np.empty((0, *shape), np.float32)

    def append(self, rows: np.ndarray) -> None:
        held = self.end - self.begin
        if held + len(rows) > len(self._rows):
            grown = np.empty((2 * (held + len(rows)), *self._rows.shape[1:]), np.float32)
            grown[:held] = self._rows[:held]
            self._rows = grown
        self._rows[held : held + len(rows)] = rows
        self.end += len(rows)

    def drop(self, before: int) -> None:
        """Forget the rows before this number."""
        count = min(before, self.end) - self.begin
        if count > 0:
            held = self.end - self.begin - count
            self._rows[:held] = self._rows[count : count + held]
            self.begin += count

    def take(self, begin: int, end: int) -> np.ndarray:
        """A copy of rows begin..end, those that there are. `begin` must not have been dropped."""
        return self._rows[max(begin - self.begin, 0) : max(min(end, self.end) - self.begin, 0)].copy()


class MelWindows:
    """Windows of 3,000 frames (30 s) over 16 kHz audio, for starts that never go back.

    Frames are those of the whole audio: a frame at a window's edge sees the samples beyond that edge. The audio is mirrored
    before its first sample, and silent behind its last. What is more than 80 dB below the peak is raised to there; the peak
    is that of all audio up to the window's end, which makes a single window equal to transformers' features of it.

    What lies before the latest start is forgotten; only what was asked for ahead of it is held. One thread at a time.
    """

    def __init__(self, stream: Iterable[np.ndarray], mels: int | LogMel):
        """stream: blocks of fp32 [samples] at 16 kHz, such as an `AudioStream`; read as far as needed, never closed."""
        self._blocks = iter(stream)
        self._mel = mels if isinstance(mels, LogMel) else LogMel(mels)
        self._samples = _Queue()
        self._frames = _Queue((self._mel.mels,))  # log powers
        self._peak = FLOOR
        self._start = 0
        self.ended = False  # whether the stream was read to its end

    @property
    def mels(self) -> int:
        return self._mel.mels

    @property
    def seconds_known(self) -> float:
        """Seconds of audio read so far: all of it once `ended`."""
        return self._samples.end / RATE

    @property
    def frames_known(self) -> int:
        """Frames of audio read so far. The last is whole, unless there is no whole one in all."""
        return max(self._samples.end // HOP, min(self._samples.end, 1))

    def at_end(self, start_frame: int) -> bool:
        """Whether no audio is left from this frame on. Reads that far."""
        self._read(HOP * (start_frame + 1))
        return start_frame >= self.frames_known

    def features(self, start_frame: int) -> tuple[np.ndarray, int]:
        """(features fp32 [3000, mels], number of frames that hold audio, 0 behind its end) of the window at a frame.

        Raises ValueError for a start before the latest one, and what the stream raises.
        """
        if start_frame < self._start:
            raise ValueError(f"the window at frame {start_frame} lies before the latest, at frame {self._start}")
        self._start = start_frame
        end = start_frame + WINDOW_FRAMES
        self._compute(end)
        self._frames.drop(start_frame)
        real = min(max(self.frames_known - start_frame, 0), WINDOW_FRAMES)
        if start_frame == 0 and self.ended and self._samples.end <= WINDOW_SAMPLES:
            # The only window is mirrored at its end like transformers': the last frame sees 40 samples behind it.
            only = np.zeros(WINDOW_SAMPLES, np.float32)
            only[: self._samples.end] = self._samples.take(0, self._samples.end)
            return self._mel(only), real
        return self._mel.scale(self._frames.take(start_frame, end), self._peak), real

    def samples(self, start: int, end: int) -> np.ndarray:
        """Samples start..end (numbers of samples, not seconds), fp32; fewer at the end of the audio. Reads that far.

        Raises ValueError if `start` lies before the latest window's start, and what the stream raises.
        """
        if start < HOP * self._start:
            raise ValueError(f"sample {start} lies before the latest window's start, {HOP * self._start}")
        self._read(end)
        return self._samples.take(start, end)

    def _read(self, until: int) -> None:
        """Read the stream until it has given `until` samples, or ends."""
        while not self.ended and self._samples.end < until:
            block = next(self._blocks, None)
            if block is None:
                self.ended = True
            else:
                self._samples.append(block)

    def _compute(self, end: int) -> None:
        """Compute the frames up to `end`. Those before the window's start count for the peak alone."""
        while (begin := self._frames.end) < end:
            stop = min(begin + WINDOW_FRAMES, end)
            self._read(HOP * (stop - 1) + HALF)
            power = self._log_power(begin, stop)
            self._peak = max(self._peak, float(power.max()))
            self._frames.append(power)
            self._frames.drop(self._start)
            self._samples.drop(min(HOP * self._start, HOP * stop - HALF))

    def _log_power(self, begin: int, stop: int) -> np.ndarray:
        first, last = HOP * begin - HALF, HOP * (stop - 1) + HALF
        if first >= self._samples.end:
            return np.full((stop - begin, self.mels), FLOOR, np.float32)
        needed = np.zeros(last - first, np.float32)
        front = max(-first, 0)
        found = self._samples.take(first + front, last)
        needed[front : front + len(found)] = found
        if front:
            needed[:front] = needed[front + 1 : 2 * front + 1][::-1]
        assert len(needed) == HOP * (stop - begin - 1) + SPAN
        return self._mel.log_power(needed)
