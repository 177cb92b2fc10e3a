"""faster-whisper as a worker of the speech benchmarks. Runs in its own Python, which needs `pip install faster-whisper`.

See speech_answers.py and speech_work.py.
"""

import time
from importlib.metadata import version

import speech_answers


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
    settings = speech_answers.settings()
    from faster_whisper import BatchedInferencePipeline, WhisperModel

    model = WhisperModel(
        settings["model"], device="cpu", compute_type={"fp32": "float32"}.get(settings["weights"], settings["weights"]),
        cpu_threads=settings["threads"], local_files_only=True,
    )  # fmt: skip
    if settings["batched"]:
        model = BatchedInferencePipeline(model)
    names = ("faster-whisper", "ctranslate2", "onnxruntime", "av")
    speech_answers.serve({name: version(name) for name in names}, lambda job: hear(model, settings, job))


if __name__ == "__main__":
    main()
