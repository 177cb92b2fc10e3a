"""faster-whisper as a worker of the speech benchmarks. Runs in its own Python, which needs `pip install faster-whisper`.

Reads JSON lines: first the settings, then a file each; answers each with a JSON line. See speech_work.py.
"""

import json
import os
import sys
import time
from importlib.metadata import version

answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # whatever a library prints goes to standard error


def hear(model, settings, job):
    """The transcript of one file; `seconds` includes decoding it. stop_after: of audio, then the rest is left."""
    options = {"language": job["language"], "beam_size": settings["beam"], **settings["options"]}
    if settings["batched"]:
        options["batch_size"] = settings["batched"]
    start = time.perf_counter()
    found, info = model.transcribe(job["file"], **options)
    segments = []
    for segment in found:
        segments.append([segment.start, segment.end, segment.text])
        if segment.end > job.get("stop_after", float("inf")):
            break
    return {"seconds": time.perf_counter() - start, "segments": segments, "duration": info.duration}


def main():
    settings = json.loads(sys.stdin.readline())
    from faster_whisper import BatchedInferencePipeline, WhisperModel

    model = WhisperModel(
        settings["model"], device="cpu", compute_type={"fp32": "float32"}.get(settings["weights"], settings["weights"]),
        cpu_threads=settings["threads"], local_files_only=True,
    )  # fmt: skip
    if settings["batched"]:
        model = BatchedInferencePipeline(model)
    names = ("faster-whisper", "ctranslate2", "onnxruntime", "av")
    print(json.dumps({"versions": {name: version(name) for name in names}}), file=answers)
    for line in sys.stdin:
        try:
            answer = hear(model, settings, json.loads(line))
        except Exception as error:  # noqa: BLE001 - the parent raises it
            answer = {"error": repr(error)}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
