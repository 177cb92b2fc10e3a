"""Word times by faster-whisper, for word_times.py: python word_times_peer.py MODEL FILE...

Runs in its own Python, which needs `pip install faster-whisper`. A line of JSON for each file: [[word, start, end], ...].
"""

import json
import sys


def main():
    from faster_whisper import WhisperModel

    model = WhisperModel(sys.argv[1], device="cpu", compute_type="float32", cpu_threads=2, local_files_only=True)
    for file in sys.argv[2:]:
        segments, _ = model.transcribe(file, language="en", beam_size=1, word_timestamps=True)
        words = [word for segment in segments for word in segment.words]
        print(json.dumps([[word.word, float(word.start), float(word.end)] for word in words]), flush=True)


if __name__ == "__main__":
    main()
