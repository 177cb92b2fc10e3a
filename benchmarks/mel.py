"""Time of log-mel features beside transformers' extractor: 30 s windows of speech, the least of many runs each, in turn.

    python benchmarks/mel.py [--threads 2] [--runs 50]

Prints the milliseconds of a window, the ratio and the largest difference for 80 and 128 mels. Transformers' extractor is
called as users call it (torch), and once more as its numpy code computes it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from transformers import WhisperFeatureExtractor

from cai_runtime.audio import LogMel, open_audio
from cai_runtime.audio.mel import RATE, WINDOW_SAMPLES
from cai_runtime.convert.sources import fetch_file


def milliseconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return (time.perf_counter() - begin) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=50)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with open_audio(fetch_file("speech-sample", progress=False)) as stream:
        clip = stream.read()
    samples = np.tile(clip, WINDOW_SAMPLES // len(clip) + 1)[:WINDOW_SAMPLES]
    print("mels  ours ms  transformers ms  ratio  its numpy ms  ratio  largest difference")
    for mels in (80, 128):
        ours, theirs = LogMel(mels), WhisperFeatureExtractor(feature_size=mels)
        found = ours(samples)
        wanted = theirs(samples, sampling_rate=RATE, return_tensors="np").input_features[0].T
        works = (
            partial(ours, samples),
            partial(theirs, samples, sampling_rate=RATE, return_tensors="np"),
            partial(theirs._np_extract_fbank_features, samples[None], "cpu"),
        )
        times = np.min([[milliseconds(work) for work in works] for _ in range(given.runs)], axis=0)
        print(
            f"{mels:4}  {times[0]:7.2f}  {times[1]:15.2f}  {times[1] / times[0]:5.2f}  {times[2]:12.2f}  "
            f"{times[2] / times[0]:5.1f}  {np.abs(found - wanted).max():.1e}"
        )


if __name__ == "__main__":
    main()
