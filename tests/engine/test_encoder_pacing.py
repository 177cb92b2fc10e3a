"""Encoder passes share the prompts' budget of a step."""

import threading

import pytest

from cai_runtime.engine.request import Request, SamplingParams
from cai_runtime.engine.segments import EncoderInput


def window(number, prompt=(1, 2, 3), count=3, rows=9):
    audio = EncoderInput(1000 + number, rows, str(number).encode())
    sampling = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    return Request(segments=(audio, list(prompt)), sampling=sampling)


@pytest.fixture
def make_recorded(make_groups):
    """A runner that notes (encoder passes, prompt tokens, sequences) of each step; it begins when `gate` is released."""

    class Recorded(make_groups):
        def __init__(self, **sizes):
            super().__init__(("full", "encoder"), **sizes)
            self.noted, self.gate = [], threading.Event()

        def launch(self, step):
            self.gate.wait(60)
            prompt_tokens = sum(len(f.ids) for f in step.feeds if len(f.ids) > 1)
            self.noted.append((len(step.encode), prompt_tokens, len(step.feeds)))
            return super().launch(step)

    return Recorded


def serve(engine, requests):
    """Submit all before the second step."""
    handles = engine.submit_all(requests)
    engine.runner.gate.set()
    return [handle.result(timeout=60) for handle in handles]


@pytest.fixture
def make_paced(make_engine, make_recorded):
    def make(chunk, **options):
        runner = make_recorded(num_pages=128, encoder_pages=60)
        engine = make_engine(runner, prefill_chunk=chunk, prefill_time=None, **options)
        engine.runner = runner
        return engine

    return make


@pytest.mark.parametrize(("chunk", "most"), [(1, 1), (4, 1), (11, 1), (20, 1), (24, 2), (100, 5)])
def test_windows_of_a_step(make_paced, chunk, most):
    """A pass of 9 rows and its prompt of 3 tokens count as 12 tokens. A larger pass goes alone."""
    engine = make_paced(chunk)
    done = serve(engine, [window(i, prompt=[1, 2, 3]) for i in range(5)])
    assert [d.token_ids for d in done] == [engine.runner.defined([1, 2, 3], 3, 1000 + i) for i in range(5)]
    passes = [encoded for encoded, *_ in engine.runner.noted]
    assert (max(passes), sum(passes)) == (most, 5)


def test_a_prompt_before_leaves_no_room(make_paced, greedy):
    """First come, first served: the window waits for the prompt, and the prompt behind it for the window."""
    engine = make_paced(10)
    serve(engine, [greedy([7] * 20, 1), window(1), greedy([8] * 5, 1)])
    assert engine.runner.noted[:3] == [(0, 10, 1), (0, 10, 1), (1, 3, 1)]
    assert engine.runner.noted[3][:2] == (0, 5)


def test_streams_go_on_while_windows_are_encoded(make_paced, greedy):
    engine = make_paced(8, max_batch=8)
    serve(engine, [greedy([4, 5], 40, ignore_eos=True), *(window(i, count=9) for i in range(6))])
    with_pass = [(passes, sequences) for passes, _, sequences in engine.runner.noted if passes]
    assert [passes for passes, _ in with_pass] == [1] * 6
    assert [sequences for _, sequences in with_pass] == [2, 3, 4, 5, 6, 7], "each step decodes all who came before"


def test_what_is_found_costs_nothing(make_paced):
    engine = make_paced(9)
    serve(engine, [window(1)])
    engine.runner.noted.clear()
    serve(engine, [window(1, prompt=[n, n, n]) for n in range(3)])
    assert engine.runner.noted[0] == (0, 9, 3)


def test_the_pace_counts_rows(make_engine, make_recorded, greedy):
    """A window's 3 prompt tokens come with 40 rows. If these did not count, a token would seem to take 14 times as long."""
    now = [0.0]

    class Timed(make_recorded):
        def launch(self, step):
            rows = sum(encoder.input.rows for encoder in step.encode)
            now[0] += 0.001 * (rows + sum(len(feed.ids) for feed in step.feeds))
            return super().launch(step)

    runner = Timed(num_pages=128, page_size=16, align=16, encoder_pages=60)
    engine = make_engine(runner, clock=lambda: now[0], prefill_time=0.1, prefix_cache=False)
    engine.runner = runner
    serve(engine, [window(i, rows=40, count=1) for i in range(8)])
    runner.noted.clear()
    serve(engine, [greedy([5] * 120, 1)])
    assert runner.noted == [(0, 120, 1)]


def test_requests_of_one_window_encode_it_once(make_paced):
    """The first one's prompt takes several steps, until whose end it is not known to be sound. The others wait for it."""
    engine = make_paced(4)
    prompts = [list(range(18)), [1], [2, 3, 4, 5]]
    done = serve(engine, [window(1, prompt, rows=1) for prompt in prompts])
    assert [d.token_ids for d in done] == [engine.runner.defined(prompt, 3, 1001) for prompt in prompts]
    assert engine.runner.encoded == [b"1"]
