"""From a checked call to a transcription's work: opens the audio and makes the speech package's generator."""

from __future__ import annotations

from cai_runtime.api.open_model import OpenModel
from cai_runtime.api.transcriptions.params import AudioFile
from cai_runtime.api.transcriptions.work import SpeechWork
from cai_runtime.speech.options import Options


def begin_work(file: AudioFile, options: Options, opened: OpenModel) -> SpeechWork:
    """Open the audio, and go to the first step.

    Raises:
        AudioError: the file can't be read, or holds no audio. TranscriptionError: the model can't do what is asked.
    """
    from cai_runtime.audio.stream import open_audio
    from cai_runtime.audio.windows import MelWindows
    from cai_runtime.speech.transcriber import transcribe_steps

    tokens = opened.speech_tokens
    stream = open_audio(file.source, file.rate, name=file.name)
    try:
        windows = MelWindows(stream, tokens.mels)
        return SpeechWork(transcribe_steps(windows, tokens, options, opened.speech_text), stream)
    except BaseException:
        stream.close()
        raise
