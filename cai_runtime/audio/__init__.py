"""Decodes audio of any source as a stream at 16 kHz, and computes the log-mel features of its windows."""

from cai_runtime.audio.mel import LogMel
from cai_runtime.audio.stream import AudioStream, open_audio
from cai_runtime.audio.windows import MelWindows

__all__ = ["AudioStream", "LogMel", "MelWindows", "open_audio"]
