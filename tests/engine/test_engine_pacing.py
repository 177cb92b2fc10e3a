"""How long the steps of an engine are, on a clock that the model's cost moves: nothing here takes real time."""

import threading

import pytest

from cai_runtime.engine.pacing import FIRST_CHUNK, RETRY_STEPS, PrefillPace, StepLimits
from cai_runtime.engine.request import SamplingParams

PROMPT = [i % 90 for i in range(2000)]


class Clock:
    """Seconds that pass in the model alone: `fixed` a step, and per token, more the later its position."""

    def __init__(self, fixed=0.006, per_token=0.0015, growth=0.5):
        self.now = 0.0
        self.fixed, self.per_token, self.growth = fixed, per_token, growth
        self.steps = []  # seconds of each

    def __call__(self):
        return self.now

    def cost(self, step):
        return self.fixed + sum(
            self.per_token * (1 + self.growth * position / 1000)
            for s in step
            for position in range(s.start, s.start + len(s.token_ids))
        )

    def attach(self, runner):
        run = runner.run

        def timed(step):
            self.steps.append(self.cost(step))
            self.now += self.steps[-1]
            return run(step)

        runner.run = timed
        return runner


@pytest.fixture
def timed_engine(make_engine, make_runner):
    """timed_engine(clock, **options): an engine whose clock is moved by its model."""

    def make(clock, **options):
        runner = clock.attach(make_runner(num_pages=2048, max_context=4096))
        engine = make_engine(runner, clock=clock, **options)
        engine.runner = runner
        return engine

    return make


def serve_beside_a_stream(engine, request, greedy, decoded=5):
    """The result of a request that arrives when another one has decoded so many tokens, and goes on to decode."""
    engine.runner.gate = threading.Semaphore(decoded)
    deltas = iter(engine.submit(greedy([1, 2, 3], 1500, ignore_eos=True)))
    for _ in range(decoded):
        next(deltas)
    handle = engine.submit(request)
    engine.runner.gate.release(1_000_000)
    done = handle.result()
    deltas.close()
    return done


@pytest.mark.parametrize("clock", [Clock(), Clock(growth=0), Clock(fixed=0.03, per_token=0.0004, growth=2)], ids=str)
def test_a_long_prompt_does_not_stop_a_stream(timed_engine, greedy, expected, clock):
    long = serve_beside_a_stream(engine := timed_engine(clock), greedy(PROMPT, 2), greedy)
    assert long.token_ids == expected(PROMPT, 2)
    assert engine.stats().worst_token_gap == pytest.approx(max(clock.steps[1:]), abs=1e-9)
    assert engine.stats().worst_token_gap <= 0.15


def test_a_prompt_is_hardly_slower_beside_a_stream(timed_engine, greedy):
    alone = timed_engine(Clock()).submit(greedy(PROMPT, 2)).result()
    beside = serve_beside_a_stream(timed_engine(Clock()), greedy(PROMPT, 2), greedy)
    assert beside.times.first_token <= 1.1 * alone.times.first_token


def test_a_slow_model_gives_a_prompt_half_of_the_time(timed_engine, greedy):
    clock = Clock(fixed=0.3, per_token=0.02, growth=0)
    serve_beside_a_stream(timed_engine(clock), greedy(PROMPT[:500], 1), greedy, decoded=20)
    beside = [seconds for seconds in clock.steps[21:] if seconds > 0.33]  # those that fed the prompt
    assert 0.55 < sorted(beside)[len(beside) // 2] < 0.65


def test_only_the_chunk_bounds_a_prompt_without_a_time(timed_engine, greedy):
    clock = Clock(growth=0)
    engine = timed_engine(clock, prefill_time=None, prefill_chunk=512)
    serve_beside_a_stream(engine, greedy(PROMPT, 2), greedy)
    assert engine.stats().worst_token_gap == pytest.approx(clock.fixed + 513 * clock.per_token, abs=1e-9)


def test_pace():
    pace = PrefillPace(0.1, 512)
    assert pace.budget(decoding=True) == pace.budget(decoding=False) == FIRST_CHUNK
    pace.observe(32, 0.032)
    assert (pace.budget(decoding=True), pace.budget(decoding=False)) == (100, 400)
    pace.observe(0, 0.04)
    assert pace.budget(decoding=True) == 60, "the decode step's own time comes off"
    pace.observe(1, 1000.0)
    assert pace.budget(decoding=True) == 1, "never none"
    pace = PrefillPace(0.1, 512)
    pace.observe(5, 0.0)
    assert pace.budget(decoding=True) == 512, "a clock that stands still"
    assert PrefillPace(None, 7).budget(decoding=True) == 7


def test_limits_are_forgotten_by_and_by():
    limits = StepLimits()
    limits.lower(sequences=16, prompt_tokens=100)
    limits.lower(sequences=32)
    assert (limits.sequences, limits.prompt_tokens) == (16, 100), "the smallest counts"
    for _ in range(RETRY_STEPS):
        limits.relax(most_sequences=64, most_tokens=200)
    assert (limits.sequences, limits.prompt_tokens) == (32, None)
    for _ in range(RETRY_STEPS):
        limits.relax(most_sequences=64, most_tokens=200)
    assert limits.sequences is None


def test_the_times_of_a_request(timed_engine, greedy):
    clock = Clock(fixed=1.0, per_token=0.0)
    engine = timed_engine(clock, max_batch=1)
    first, second = engine.submit_all([greedy([1], 5, ignore_eos=True)] * 2)
    times = first.result().times
    assert (times.queue, times.first_token, times.per_token) == (0.0, 1.0, 1.0)
    times = second.result().times
    assert (times.queue, times.first_token, times.per_token) == (5.0, 6.0, 1.0)
    stats = engine.stats()
    assert (stats.queue_seconds, stats.first_token_seconds, stats.decode_seconds) == (5.0, 7.0, 8.0)
    assert stats.worst_token_gap == 1.0


def test_one_token_has_no_time_per_token(timed_engine):
    from cai_runtime.engine.request import Request

    done = timed_engine(Clock()).submit(Request([1], SamplingParams(max_tokens=1))).result()
    assert done.times.per_token == 0.0 and done.times.first_token > 0
