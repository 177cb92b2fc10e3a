"""cai_runtime as a worker of the speech benchmarks: as speech_peer.py. See speech_work.py."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # whatever a library prints goes to standard error


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
    settings = json.loads(sys.stdin.readline())
    import cai_runtime
    from cai_runtime.bench.machine import versions

    with cai_runtime.Client(model=settings["model"], device="cpu", **settings["engine"]) as client:
        print(json.dumps({"versions": versions()}), file=answers)
        for line in sys.stdin:
            try:
                answer = hear(client, settings, json.loads(line))
            except Exception as error:  # noqa: BLE001 - the parent raises it
                answer = {"error": repr(error)}
            print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
