"""cai_runtime as a worker of the speech benchmarks: as speech_peer.py. See speech_work.py."""

from __future__ import annotations

import time
from typing import Any

import speech_answers


def hear(client: Any, settings: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {"language": job["language"], "beam_size": settings["beam"], **settings["options"]}
    if settings["batched"]:
        options |= {"batched": True, "windows_together": settings["batched"]}
    start = time.perf_counter()
    segments: list[Any] = []
    with client.audio.transcriptions.create(file=job["file"], stream=True, **options) as events:
        for event in events:
            if event.type == "transcript.text.segment":
                segments.append([event.start, event.end, event.text])
                if event.end > job.get("stop_after", float("inf")):
                    break
    return {"seconds": time.perf_counter() - start, "segments": segments}


def main() -> None:
    settings = speech_answers.settings()
    import cai_runtime
    from cai_runtime.bench.machine import versions

    with cai_runtime.Client(model=settings["model"], device="cpu", **settings["engine"]) as client:
        speech_answers.serve(versions(), lambda job: hear(client, settings, job))


if __name__ == "__main__":
    main()
