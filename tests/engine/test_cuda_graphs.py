"""Decode steps over fixed buffers: sizes, padding, and the model runner with a capture that records nothing."""

from __future__ import annotations

import gc
import random
import weakref
from pathlib import Path

import pytest
import torch

from cai_runtime.engine.cuda_graphs import DecodeGraphs, Forward, StaticBatch, batch_sizes, table_widths
from cai_runtime.engine.model_runner import ModelRunner
from cai_runtime.engine.seats import Seats, StepNumbers
from cai_runtime.engine.step import Feed, NewPages, ScheduledSequence, seated
from cai_runtime.errors import KernelError
from cai_runtime.kernels.batch import FULL

PAGE_SIZE, PAGES, VOCAB = 4, 40, 320
CPU = torch.device("cpu")


class Replays:
    """A capture that keeps the forward as it is, and counts."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, forward: Forward) -> Forward:
        self.captured += 1

        def replay() -> torch.Tensor:
            self.replayed += 1
            return forward()

        return replay


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (4, (1, 2, 4)), (5, (1, 2, 4, 5)), (17, (1, 2, 4, 8, 16, 17)),
        (32, (1, 2, 4, 8, 16, 24, 32)), (100, (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100)),
    ],
)  # fmt: skip
def test_sizes(most: int, sizes: tuple[int, ...]):
    assert batch_sizes(most) == sizes


@pytest.mark.parametrize(
    ("pages", "widths"), [(1, (1,)), (64, (64,)), (65, (64, 65)), (512, (64, 512)), (8192, (64, 512, 4096, 8192))]
)
def test_table_widths(pages: int, widths: tuple[int, ...]):
    assert table_widths(pages) == widths


def test_a_longer_context_takes_a_wider_table(checkpoint: Path):
    """Past a recorded width the next one is recorded; the logits are those of the plain path."""
    prompts, tables = sequences(5, [5, 2])
    plain = decode(open_runner(checkpoint, capture=None), prompts, tables, 6)
    capture = Replays()
    runner = open_runner(checkpoint, capture=capture)
    assert runner._graphs is not None
    runner._graphs.widths = (2, 16)
    padded = decode(runner, prompts, tables, 6)
    assert capture.captured == 2  # up to 8 positions, and beyond
    for a, b in zip(plain, padded, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


class WarmReplays(Replays):
    """Runs the forward before it is recorded, as `CudaCapture` does."""

    def __call__(self, forward: Forward) -> Forward:
        forward()
        return super().__call__(forward)


def test_recording_writes_into_nobodys_pages(checkpoint: Path):
    """A wider table is recorded while the buffers still hold a step of a sequence that has ended, and whose page is
    another's by then."""
    found = []
    for capture in (None, WarmReplays()):
        runner = open_runner(checkpoint, capture=capture)
        if runner._graphs is not None:
            runner._graphs.widths = (2, 16)
        runner.run([ScheduledSequence([5, 6, 7], 0, [3, 4], 1)])
        runner.run([ScheduledSequence([8], 3, [3, 4], 1)])  # into page 3, with the narrow table
        runner.run([ScheduledSequence(list(range(10, 22)), 0, [3, 5, 6, 7], 1)])
        found.append(runner.run([ScheduledSequence([9], 12, [3, 5, 6, 7], 1)]).clone())
    torch.testing.assert_close(*found, rtol=0, atol=2e-6)


def numbers(sequences: list[ScheduledSequence]) -> StepNumbers:
    step, seats = seated(sequences, {FULL: (1, 0)}), Seats(PAGE_SIZE)
    seats.write(step.pages)
    return seats.numbers(step.feeds)


def addresses(static: StaticBatch) -> list[int]:
    b, table = static.batch, static.batch.tables[FULL]
    tensors = (static.ids, b.positions, b.query_start, b.context_len, table.slots, table.pages)
    return [t.data_ptr() for t in tensors]


def test_static_batch_keeps_its_addresses_and_pads():
    static = StaticBatch(4, pages=3, page_size=PAGE_SIZE, scratch_pages={FULL: 9}, device=CPU)
    fixed = addresses(static)
    static.fill(numbers([ScheduledSequence([7], 9, [5, 6, 8], 1), ScheduledSequence([3], 0, [2], 1)]))
    assert static.ids.tolist() == [7, 3, 0, 0]
    b = static.batch
    assert b.positions.tolist() == [9, 0, 0, 0]
    assert b.tables[FULL].slots.tolist() == [8 * PAGE_SIZE + 1, 2 * PAGE_SIZE, 9 * PAGE_SIZE, 9 * PAGE_SIZE]
    assert b.context_len.tolist() == [10, 1, 1, 1]
    assert b.query_start.tolist() == [0, 1, 2, 3, 4]
    assert b.tables[FULL].pages.tolist() == [[5, 6, 8], [2, 0, 0], [9, 9, 9], [9, 9, 9]]
    static.fill(numbers([ScheduledSequence([1], 3, [4], 1)]))  # nothing of the step before is read any more
    assert b.tables[FULL].pages[:, 0].tolist() == [4, 9, 9, 9] and b.context_len.tolist() == [4, 1, 1, 1]
    assert addresses(static) == fixed


def test_static_batch_of_two_groups_has_a_table_for_each():
    static = StaticBatch(3, pages=4, page_size=PAGE_SIZE, scratch_pages={"full": 9, "window": 5}, device=CPU)
    seats = Seats(PAGE_SIZE, ["full", "window"])
    seats.write([NewPages(2, "full", 0, [7, 1, 3]), NewPages(2, "window", 0, [0, 0, 4])])
    static.fill(seats.numbers([Feed(2, 9, [6], 1)]))
    tables = static.narrowed(3).tables
    assert tables["full"].slots.tolist() == [3 * PAGE_SIZE + 1, 9 * PAGE_SIZE, 9 * PAGE_SIZE]
    assert tables["window"].slots.tolist() == [4 * PAGE_SIZE + 1, 5 * PAGE_SIZE, 5 * PAGE_SIZE]
    assert tables["full"].pages.tolist() == [[7, 1, 3], [9, 9, 9], [9, 9, 9]]
    assert tables["window"].pages.tolist() == [[0, 0, 4], [5, 5, 5], [5, 5, 5]]
    assert static.batch.context_len.tolist() == [10, 1, 1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def open_runner(checkpoint: Path, *, capture: Replays | None, max_batch: int = 6, backend: str = "reference"):
    from cai_runtime.layers.linear import WeightLoader
    from cai_runtime.models.registry import build_model
    from cai_runtime.slim.reader import Checkpoint

    with Checkpoint.open(checkpoint) as opened:
        model = build_model(WeightLoader(opened, CPU, torch.float32, backend))
    groups = model.cache_groups(PAGE_SIZE if backend == "reference" else 16, torch.float32)
    return ModelRunner(
        model, groups, {group.name: PAGES for group in groups}, cache_dtype=torch.float32,
        cuda_graphs=capture is not None, max_batch=max_batch, capture=capture,
    )  # fmt: skip


def sequences(seed: int, lengths: list[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and the pages of each, room for eight more tokens."""
    rng = random.Random(seed)
    pages = rng.sample(range(PAGES), PAGES)
    tables = [[pages.pop() for _ in range((n + 8) // PAGE_SIZE + 1)] for n in lengths]
    return [[rng.randrange(VOCAB) for _ in range(n)] for n in lengths], tables


def decode(runner: ModelRunner, prompts: list[list[int]], tables: list[list[int]], steps: int) -> list[torch.Tensor]:
    """Prefill, then greedy steps; the logits of each step, copied."""
    logits = runner.run([ScheduledSequence(p, 0, t, 1) for p, t in zip(prompts, tables, strict=True)]).clone()
    seen, lengths = [logits], [len(p) for p in prompts]
    for _ in range(steps):
        tokens = seen[-1].argmax(-1).tolist()
        step = [ScheduledSequence([t], n, p, 1) for t, n, p in zip(tokens, lengths, tables, strict=True)]
        seen.append(runner.run(step).clone())
        lengths = [n + 1 for n in lengths]
    return seen


@pytest.mark.parametrize("lengths", [[5], [1, 9, 4], [3, 6, 1, 7, 2]])
def test_padded_steps_give_the_logits_of_the_plain_path(checkpoint: Path, lengths: list[int]):
    prompts, tables = sequences(len(lengths), lengths)
    plain = decode(open_runner(checkpoint, capture=None), prompts, tables, 6)
    capture = Replays()
    runner = open_runner(checkpoint, capture=capture)
    padded = decode(runner, prompts, tables, 6)
    assert (capture.captured, capture.replayed) == (1, 6 if lengths != [1] else 7)
    for a, b in zip(plain, padded, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)  # torch's own products depend on the number of rows


def test_padding_changes_no_bit_and_no_page_of_others(checkpoint: Path):
    """The same sequences in larger and larger batches' buffers: the same logits, the same cache."""
    prompts, tables = sequences(7, [3])
    outcome = []
    for max_batch in (1, 2, 6):
        runner = open_runner(checkpoint, capture=Replays(), max_batch=max_batch)
        assert runner._graphs is not None
        runner._graphs.sizes = runner._graphs.sizes[-1:]  # every step padded to the largest
        assert runner._model is not None
        caches = [block.attention.cache for block in runner._model.blocks]  # type: ignore[attr-defined]
        logits = decode(runner, prompts, tables, 5)
        assert all(len(c.k) == PAGES + 1 for c in caches)
        kept = torch.stack([torch.cat([c.k[:PAGES], c.v[:PAGES]]) for c in caches])
        others = [p for p in range(PAGES) if p not in tables[0]]
        assert not kept[:, others].any()
        outcome.append((torch.stack(logits), kept))
    for logits, kept in outcome[1:]:
        torch.testing.assert_close(logits, outcome[0][0], rtol=0, atol=2e-6)
        torch.testing.assert_close(kept, outcome[0][1], rtol=0, atol=2e-6)


def test_steps_that_are_no_plain_decode_take_the_plain_path(checkpoint: Path):
    prompts, tables = sequences(3, [4, 5])
    capture = Replays()
    runner = open_runner(checkpoint, capture=capture, max_batch=1)
    step = [ScheduledSequence(p, 0, t, 1) for p, t in zip(prompts, tables, strict=True)]
    assert runner.run(step).shape == (2, VOCAB)
    runner.run([ScheduledSequence([1], len(p), t, 1) for p, t in zip(prompts, tables, strict=True)])  # two of one
    runner.run([ScheduledSequence([1], 4, tables[0], 0)])  # no logits wanted
    assert capture.captured == 0
    runner.run([ScheduledSequence([1], 4, tables[0], 1)])
    assert capture.captured == capture.replayed == 1


def test_record_all_and_close(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    capture = Replays()
    runner = open_runner(checkpoint, capture=capture, max_batch=16)
    runner.record_graphs(progress=True)
    assert capture.captured == 5 and "record" in capsys.readouterr().err
    runner.record_graphs(progress=False)
    assert capture.captured == 5 and capsys.readouterr().err == ""
    model = weakref.ref(runner._model)
    runner.close()
    gc.collect()
    assert model() is None
    with pytest.raises(RuntimeError, match="closed"):
        runner.run([])
    runner.close()


def test_a_step_that_cannot_be_recorded_is_said(checkpoint: Path):
    def refuse(forward: Forward) -> Forward:
        raise RuntimeError("operation not permitted when stream is capturing")

    runner = open_runner(checkpoint, capture=refuse)  # type: ignore[arg-type]
    with pytest.raises(KernelError, match="cuda_graphs=False"):
        runner.record_graphs()


def test_graphs_without_a_gpu_are_refused(checkpoint: Path):
    runner = open_runner(checkpoint, capture=None)
    with pytest.raises(KernelError, match="on cpu"):
        ModelRunner(runner._model, runner.groups, {FULL: 4}, cache_dtype=torch.float32, cuda_graphs=True)  # type: ignore[arg-type]


def test_a_graph_takes_no_more_than_it_was_made_for():
    graphs = DecodeGraphs.__new__(DecodeGraphs)
    graphs.sizes = batch_sizes(2)
    one = ScheduledSequence([1], 0, [0], 1)
    assert graphs.takes(numbers([one])) and graphs.takes(numbers([one] * 2))
    assert not graphs.takes(numbers([one] * 3))
    assert not graphs.takes(numbers([one, ScheduledSequence([1, 2], 0, [0], 1)]))
    assert not graphs.takes(numbers([one, ScheduledSequence([1], 0, [0], 0)]))


def test_an_engine_over_recorded_steps_launches_them_ahead(checkpoint: Path):
    """The texts are those of the plain path; tokens go from step to step without the host."""
    from cai_runtime.engine.engine import Engine
    from cai_runtime.engine.request import Request, SamplingParams
    from cai_runtime.engine.step import NEXT

    class Words:
        def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
            return "".join(chr(0x100 + t) for t in token_ids)

    requests = [
        Request([7, 3, 30 + i], SamplingParams(max_tokens=12 + i, temperature=0.0, ignore_eos=i % 2 == 0))
        for i in range(5)
    ]
    texts, ahead = [], 0
    for capture in (None, Replays()):
        runner = open_runner(checkpoint, capture=capture)
        launch = runner.launch

        def counted(step, launch=launch):
            nonlocal ahead
            ahead += sum(feed.ids == [NEXT] for feed in step.feeds)
            return launch(step)

        runner.launch = counted  # type: ignore[method-assign]
        with Engine(runner, Words(), eos_token_ids=[2]) as engine:
            texts.append([handle.result().token_ids for handle in engine.submit_all(requests)])
    assert texts[0] == texts[1]
    assert ahead > 30
