"""One file's transcription as a program: the audio that is read, and the generator that says what the engine is to do."""

from __future__ import annotations

import threading
from typing import Any

from cai_runtime.errors import RequestAbortedError
from cai_runtime.speech.results import Transcript
from cai_runtime.speech.steps import Step, Steps


class SpeechWork:
    """The generator of a transcription and the step that it is at. One thread at a time makes it go on; `close` may come
    from any other.

    Args:
        steps: not begun. It is taken to its first step, which reads the first window of audio.
        stream: of the audio: its `damage` is told, and it is closed at the end.
    """

    def __init__(self, steps: Steps, stream: Any):
        self._steps, self._stream = steps, stream
        self._turn = threading.Lock()  # of whoever is inside of the generator
        self._closing = False
        try:
            self.step: Step | Transcript = self._next(None)
        except BaseException:
            self.close()
            raise

    @property
    def damage(self) -> str | None:
        """What is wrong with a file that could be read in part; None: nothing that was met yet."""
        damage: str | None = self._stream.damage
        return damage

    def go_on(self, answer: Any) -> None:
        """Go to the next step. answer: to this one."""
        try:
            with self._turn:
                if self._closing:
                    raise RequestAbortedError("the transcription was aborted")
                self.step = self._next(answer)
        finally:
            if self._closing:  # meanwhile, by another thread, which could not close a generator that runs
                self.close()

    def close(self) -> None:
        """End the generator and close the file; at once, or when the step under way is done. Idempotent."""
        self._closing = True
        if self._turn.acquire(blocking=False):
            try:
                self._steps.close()
                self._stream.close()
            finally:
                self._turn.release()

    def _next(self, answer: Any) -> Step | Transcript:
        try:
            return self._steps.send(answer)
        except StopIteration as end:
            transcript: Transcript = end.value
            return transcript
