"""What a transcription, a generator, says to whoever drives it.

It yields one of these and is sent the answer: `Need` the results of all its requests, in order; `Ask` a ticket of the
driver's, at once; `Ready` whether a ticket's requests are finished; `Answer` their results; `Done` nothing. Closing the
generator ends the transcription; the driver aborts what runs then.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from cai_runtime.engine.request import Request
from cai_runtime.speech.results import Segment, Transcript

FRAMES = 3000  # of a window: 30 s
FRAMES_PER_SECOND = 100


@dataclass(frozen=True, eq=False)
class Need:
    """Requests whose results are needed before anything else happens. Answer: list[Finished]."""

    requests: list[Request]


@dataclass(frozen=True, eq=False)
class Ask:
    """Requests that begin now and are waited for later. Answer: a ticket."""

    requests: list[Request]


@dataclass(frozen=True, eq=False)
class Answer:
    """Waits for the requests of a ticket, once. Answer: list[Finished]."""

    ticket: Any


@dataclass(frozen=True, eq=False)
class Ready:
    """Whether the requests of a ticket are finished. Answer: bool, at once."""

    ticket: Any


@dataclass(frozen=True)
class Done:
    """Segments that are final, maybe none; the audio up to `end` (seconds) is transcribed. `duration`: seconds of audio
    read so far, which is all of it towards the end."""

    segments: list[Segment] = field(default_factory=list)
    end: float = 0.0
    duration: float = 0.0


Step = Need | Ask | Ready | Answer | Done
Steps = Generator[Step, Any, Transcript]


class Windows(Protocol):
    """Windows of log-mel features, moving forward through audio, such as `cai_runtime.audio`'s `MelWindows`."""

    @property
    def seconds_known(self) -> float:
        """Seconds of audio read so far."""
        ...

    def features(self, start: int) -> tuple[np.ndarray, int]:
        """(fp32 [3000, mels] from frame `start` on, frames of them that hold audio: 0 at the end)."""
        ...


class SampledWindows(Windows, Protocol):
    """Windows whose samples can be heard, too."""

    def samples(self, start: int, end: int) -> np.ndarray:
        """fp32 mono samples at 16 kHz, by number; fewer at the end."""
        ...
