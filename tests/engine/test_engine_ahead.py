"""Steps that are launched before the tokens of the one before are known, as on a GPU."""

import itertools
import threading
from functools import partial

import pytest

from cai_runtime.engine.beam_search import BeamSearch
from cai_runtime.engine.request import Request, SamplingParams
from cai_runtime.engine.runner_thread import CallThread
from cai_runtime.engine.step import NEXT, ScheduledSequence
from cai_runtime.errors import RunnerError
from cai_runtime.kernels.sampling import sample_cpu


class Device:
    """A runner whose model and sampler run in order somewhere else, and which keeps what each seat sampled last."""

    ahead = True

    def __init__(self, simple):
        self.simple = simple
        self.page_size, self.num_pages = simple.page_size, simple.num_pages
        self.vocab_size, self.max_context = simple.vocab_size, simple.max_context
        self.queue = CallThread("cai-runner-device")
        self.pages, self.last, self.launched, self.nexts = {}, {}, 0, 0
        self.launches = threading.Semaphore(0)

    def launch(self, step):
        self.launched += 1
        self.nexts += sum(feed.ids == [NEXT] for feed in step.feeds)
        self.launches.release()
        promise = self.queue.submit(partial(self._run, step))
        promise.seats = [feed.seat for feed in step.feeds for _ in range(feed.wanted)]
        return promise

    def _run(self, step):
        for change in step.pages:
            table = self.pages.setdefault(change.seat, [])
            table[change.at : change.at + len(change.pages)] = change.pages
        self.simple.copy_pages([(copy.source, copy.target) for copy in step.copies])
        feeds = []
        for f in step.feeds:
            ids = [self.last[f.seat] if token_id == NEXT else token_id for token_id in f.ids]
            feeds.append(ScheduledSequence(ids, f.start, self.pages[f.seat], f.wanted))
        return self.simple.run(feeds)

    def sample(self, made, batch):
        def call():
            sampled = sample_cpu(made.wait(), batch)
            self.last.update(zip(made.seats, sampled.ids.tolist(), strict=True))
            return sampled

        return self.queue.submit(call)

    def close(self):
        self.queue.close()
        self.simple.close()


def run_all(engine, requests):
    return [handle.result(timeout=60) for handle in engine.submit_all(requests)]


def fail_at(runner, *passes):
    """Let these of its passes, counted from 1, run out of memory."""
    run, count = runner.run, itertools.count(1)

    def transient(step):
        if next(count) in passes:
            raise MemoryError("out of memory")
        return run(step)

    runner.run = transient


@pytest.mark.parametrize(
    ("runner", "options"),
    [
        ({"num_pages": 512}, {}),
        ({"num_pages": 512}, {"max_batch": 3, "prefill_chunk": 5}),
        ({"num_pages": 20}, {"prefill_chunk": 9}),  # 80 positions for 24 sequences of up to 80
        ({"num_pages": 200, "page_size": 1}, {"prefix_cache": False}),
    ],
    ids=["roomy", "few seats", "preempted", "tiny pages"],
)
def test_texts_are_the_same(make_engine, make_runner, prompts, runner, options):
    ways = [
        {"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 0.8, "presence_penalty": 0.5},
        {"temperature": 0.9, "min_tokens": 6, "logit_bias": {96: 4.0}}, {"temperature": 0.0, "stop": ("\u0120", "\u0130")},
        {"temperature": 0.7, "logprobs": 3}, {"temperature": 0.0, "logprobs": 0, "prompt_logprobs": 2},
    ]  # fmt: skip
    requests = [
        Request(prompt, SamplingParams(max_tokens=20, seed=i, **ways[i % len(ways)]))
        for i, prompt in enumerate(prompts)
    ]
    plain = make_engine()
    alone = [plain.submit(request).result() for request in requests]
    for some in (requests, requests[:1], requests[1::5]):
        device = Device(make_runner(**runner))
        engine = make_engine(device, **options)
        together = run_all(engine, some)
        expected = [alone[requests.index(request)] for request in some]
        for found, wanted in zip(together, expected, strict=True):
            assert (found.token_ids, found.text, found.finish_reason) == (
                wanted.token_ids, wanted.text, wanted.finish_reason
            )  # fmt: skip
            assert (found.logprobs, found.prompt_logprobs) == (wanted.logprobs, wanted.prompt_logprobs)
        assert device.nexts > 0 or some is requests
        assert engine.stats().tokens_decoded == sum(len(e.token_ids) for e in expected)


def test_the_next_step_is_launched_before_the_tokens_are_there(make_engine, make_runner, greedy, expected):
    simple = make_runner()
    simple.gate = threading.Semaphore(0)
    device = Device(simple)
    handle = make_engine(device).submit(greedy([1, 2], 6, ignore_eos=True))
    for _ in range(2):
        assert device.launches.acquire(timeout=30), "two steps are on the device, and none has run"
    simple.gate.release(10_000)
    assert handle.result().token_ids == expected([1, 2], 6)
    assert (device.launched, device.nexts) == (6, 5), "no row is launched that max_tokens rules out"


def test_the_row_behind_the_end_of_a_text_is_dropped(make_engine, make_runner, greedy, expected):
    prompt = next([i, j] for i in range(90) for j in range(5) if 96 in expected([i, j], 20))
    text = expected(prompt, 20)
    device = Device(make_runner())
    engine = make_engine(device)
    assert engine.submit(greedy(prompt)).result().token_ids == text
    assert engine.submit(greedy([3], 5, ignore_eos=True)).result().token_ids == expected([3], 5)
    assert device.launched == len(text) + 1 + 5


def test_a_step_that_fails_spoils_the_one_behind_it_alone(make_engine, make_runner, greedy, expected, prompts):
    simple = make_runner(num_pages=512)
    fail_at(simple, 4, 9)
    engine = make_engine(Device(simple), prefill_time=None)
    requests = [greedy(prompt, 30, ignore_eos=True) for prompt in prompts[:4]]
    for done, prompt in zip(run_all(engine, requests), prompts, strict=False):
        plain = expected(prompt, 30)
        assert done.token_ids[: len(plain)] == plain
    assert engine.stats().retries > 0 and engine.stats().failed == 0


def test_a_guilty_request_fails_alone(make_engine, make_runner, greedy, expected):
    simple = make_runner()
    text = expected([1, 2], 20)
    simple.fail_on = text[5]
    assert text.index(text[5]) == 5
    engine = make_engine(Device(simple))
    bad, good = engine.submit_all([greedy([1, 2]), greedy([3], 20, ignore_eos=True)])
    with pytest.raises(RunnerError, match="poison"):
        bad.result()
    if simple.fail_on not in expected([3], 20):
        assert good.result().token_ids[:5] == expected([3], 20)[:5]


def test_a_pass_is_launched_ahead_of_its_masks(make_engine, make_runner, prompts, hash_mask, obeys):
    """What a mask allows behind the step under way depends on that step's tokens: only the sampling waits for them."""
    requests = [
        Request(prompt, SamplingParams(max_tokens=20, seed=i, temperature=i % 2), mask=hash_mask if i % 3 else None)
        for i, prompt in enumerate(prompts)
    ]
    plain = make_engine()
    alone = [plain.submit(request).result() for request in requests]
    for some in (requests, requests[1:2], requests[1::5]):
        device = Device(make_runner(num_pages=512))
        engine = make_engine(device)
        together = run_all(engine, some)
        assert [(t.token_ids, t.text) for t in together] == [
            (alone[requests.index(request)].token_ids, alone[requests.index(request)].text) for request in some
        ]
        assert all(obeys(t.token_ids) for t, request in zip(together, some, strict=True) if request.mask)
        assert device.nexts > 0


def test_a_failed_step_before_a_masked_one(make_engine, make_runner, prompts, hash_mask):
    requests = [
        Request(prompt, SamplingParams(max_tokens=30, seed=i, ignore_eos=True), mask=hash_mask)
        for i, prompt in enumerate(prompts[:4])
    ]
    plain = make_engine()
    alone = [plain.submit(request).result().token_ids for request in requests]
    simple = make_runner(num_pages=512)
    fail_at(simple, 4, 9)
    engine = make_engine(Device(simple), prefill_time=None)
    assert [done.token_ids for done in run_all(engine, requests)] == alone
    assert engine.stats().retries > 0 and engine.stats().failed == 0


def test_searches_beside_plain_requests(make_engine, make_runner, prompts, greedy):
    """Which tokens a search goes on with is known after its step: nothing is launched ahead while one runs."""
    requests = [greedy(prompt, 4 + i) for i, prompt in enumerate(prompts)]
    for i, request in enumerate(requests):
        request.beam = BeamSearch(1 + i % 4) if i % 3 == 0 else None
    plain = make_engine()
    alone = [plain.submit(request).result().token_ids for request in requests]
    for pages in (512, 45):
        device = Device(make_runner(num_pages=pages))
        assert [done.token_ids for done in run_all(make_engine(device), requests)] == alone
        assert device.nexts > 0
