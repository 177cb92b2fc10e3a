"""Twenty files at once, alone and beside twenty chats: the same text and times as one by one, and how long it takes.

    python benchmarks/transcribe_many.py [--model whisper-tiny.en] [--chat-model smollm2-135m-instruct]

Files are the shortest English ones of speech_corpus.py's corpus, with word times. A file that is no audio goes with them and
must fail alone. Chats are greedy, and their replies must be those that they get alone. Writes
benchmarks/results/transcribe_many.json; ends with exit status 1 where anything differs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from speech_work import corpus, today, write_results

import cai_runtime
from cai_runtime.bench.machine import versions
from cai_runtime.convert.sources import pull

FILES, CHATS, TOKENS = 20, 20, 64
WORDS = ("the sea", "bread", "printing", "a bridge", "winter", "an engine", "a violin", "rain", "a lighthouse", "chess")
KEY = ("model", "beam", "who")


def heard(client: Any, file: Any, beam: int) -> Any:
    """Text, segments and words of a file, with every time; or the name of the error."""
    try:
        reply = client.audio.transcriptions.create(
            file=file, model="speech", language="en", beam_size=beam, timestamp_granularities=["segment", "word"]
        )
    except cai_runtime.BadRequestError as error:
        return type(error).__name__, error.param
    segments = [(s.start, s.end, s.text, s.tokens, s.avg_logprob) for s in reply.segments]
    return reply.text, segments, [(w.start, w.end, w.word) for w in reply.words]


def answered(client: Any, number: int) -> Any:
    question = f"Write {number + 2} sentences about {WORDS[number % len(WORDS)]}."
    reply = client.chat.completions.create(
        model="chat", messages=[{"role": "user", "content": question}], temperature=0, max_tokens=TOKENS
    )
    return reply.choices[0].message.content


def at_once(calls: Sequence[Callable[[], Any]]) -> tuple[list[Any], float]:
    """The results of calls that run at once, and the seconds they took together."""
    start = time.perf_counter()
    with ThreadPoolExecutor(len(calls)) as pool:
        results = list(pool.map(lambda call: call(), calls))
    return results, time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="whisper-tiny.en")
    parser.add_argument("--chat-model", default="smollm2-135m-instruct")
    parser.add_argument("--beam", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results/transcribe_many.json")
    args = parser.parse_args()
    lines = sorted((line for line in corpus() if line["language"] == "en"), key=lambda line: line["seconds"])[:FILES]
    files: list[Any] = [line["audio"] for line in lines]
    broken = len(files) // 2
    files.insert(broken, ("noise.wav", b"no audio" * 100))
    models = {"speech": pull(args.model), "chat": pull(args.chat_model)}
    with cai_runtime.Client(models=models, device="cpu") as client:
        hear = [lambda f=file: heard(client, f, args.beam) for file in files]
        chat = [lambda n=number: answered(client, n) for number in range(CHATS)]
        hear[0](), chat[0]()  # opens the models
        start = time.perf_counter()
        alone = [call() for call in hear]
        one_by_one = time.perf_counter() - start
        replies, chat_seconds = at_once(chat)
        together, together_seconds = at_once(hear)
        both, both_seconds = at_once([*hear, *chat])
    count = len(files)
    row = {
        "model": args.model, "beam": args.beam, "who": "ours", "date": today(), "versions": versions(), "files": FILES,
        "audio_seconds": round(sum(line["seconds"] for line in lines), 1), "chats": CHATS,
        "one_by_one_seconds": round(one_by_one, 2), "at_once_seconds": round(together_seconds, 2),
        "chats_seconds": round(chat_seconds, 2), "both_seconds": round(both_seconds, 2),
        "broken_file": alone[broken], "different_at_once": sum(a != b for a, b in zip(alone, together, strict=True)),
        "different_beside_chats": sum(a != b for a, b in zip(alone, both[:count], strict=True)),
        "different_chats": sum(a != b for a, b in zip(replies, both[count:], strict=True)),
    }  # fmt: skip
    write_results(args.json, "transcribe many", [row], KEY)
    print(row)
    failed_alone = alone[broken] == ("BadRequestError", "file") and sum(len(a) == 2 for a in alone) == 1
    return int(not failed_alone or any(row[name] for name in row if name.startswith("different")))


if __name__ == "__main__":
    sys.exit(main())
