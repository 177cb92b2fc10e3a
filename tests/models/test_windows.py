"""Models with sliding windows through the engine: the text is transformers', in the pages that a window needs."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import feed, tiny_model

from cai_runtime.engine.engine import Engine
from cai_runtime.engine.model_runner import ModelRunner
from cai_runtime.engine.open import load_runner
from cai_runtime.engine.request import Request, SamplingParams
from cai_runtime.errors import MemoryBudgetError
from cai_runtime.layers.linear import WeightLoader
from cai_runtime.models.registry import build_model
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.stock.cached_forward import cached_forward

WINDOW, NEW = 20, 30
MODELS: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2},
    "ministral": {
        "model_type": "ministral",
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "head_dim": 16,
    },
    "ministral in one pool": {
        "model_type": "ministral",
        "layer_types": ["full_attention", "sliding_attention"],
        "head_dim": 16,
    },
    "qwen2": {
        "model_type": "qwen2",
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "max_window_layers": 1,
    },
    "qwen3": {
        "model_type": "qwen3",
        "layer_types": ["sliding_attention", "full_attention"],
        "use_sliding_window": True,
        "head_dim": 16,
    },
}


class Words:
    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(0x100 + t) for t in token_ids)


def prompts() -> list[list[int]]:
    """Up to six windows long; some begin alike."""
    rng = random.Random(3)
    beginnings = [[rng.randrange(300) for _ in range(n)] for n in (0, 33, 70)]
    return [[*beginnings[i % 3], *(rng.randrange(300) for _ in range(rng.randrange(1, 60)))] for i in range(9)]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A checkpoint, and the greedy texts of `prompts` by transformers."""
    path = tmp_path_factory.mktemp("model")
    stock, texts = tiny_model(path, sliding_window=WINDOW, **MODELS[request.param]), []
    with torch.inference_mode():
        for prompt in prompts():
            text: list[int] = []
            out, cache = cached_forward(stock, None, input_ids=torch.tensor([prompt]))
            while True:
                text.append(int(out.logits[0, -1].argmax()))
                if len(text) == NEW:
                    break
                out, cache = cached_forward(stock, cache, input_ids=torch.tensor([text[-1:]]))
            texts.append(text)
    return path, texts


def open_model(path: Path, pages: int, backend: str = "cpu", **options: Any) -> ModelRunner:
    """pages: of each pool."""
    with Checkpoint.open(path) as checkpoint:
        built = build_model(WeightLoader(checkpoint, torch.device("cpu"), torch.float32, backend))
    groups = built.cache_groups(16, torch.float32)
    return ModelRunner(built, groups, {g.name: pages for g in groups}, cache_dtype=torch.float32, **options)


def greedy(prompt: list[int], count: int = NEW) -> Request:
    return Request(prompt, SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True))


class Replays:
    """A capture of decode steps that records nothing."""

    def __init__(self) -> None:
        self.replayed = 0

    def __call__(self, forward: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def replay() -> torch.Tensor:
            self.replayed += 1
            return forward()

        return replay


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("pages", "options"),
    [
        (200, {}),
        (200, {"prefill_chunk": 7}),
        (200, {"max_batch": 1, "prefix_cache": False}),
        (14, {"prefill_chunk": 11}),
        (14, {"prefix_cache": False}),
    ],
    ids=["plenty", "chunks", "alone", "few pages", "few pages, no reuse"],
)
def test_text_is_transformers(model: tuple[Path, list[list[int]]], backend: str, pages: int, options: dict[str, Any]):
    path, texts = model
    runner = open_model(path, pages, backend)
    with Engine(runner, Words(), eos_token_ids=[], **options) as engine:
        for _ in range(2):  # the second time much is found
            handles = engine.submit_all([greedy(prompt) for prompt in prompts()])
            assert [list(handle.result(timeout=60).token_ids) for handle in handles] == texts
            engine.check_integrity()
        stats = engine.stats()
    assert (stats.preemptions > 0) == (pages == 14 and len(runner.groups) == 2), "windows alone need few pages"
    if pages == 200:
        assert (stats.prefix_hit_tokens > 0) == options.get("prefix_cache", True)


def test_recorded_decode_steps_give_the_same_text(model: tuple[Path, list[list[int]]]):
    path, texts = model
    capture = Replays()
    runner = open_model(path, 200, "reference", cuda_graphs=True, max_batch=5, capture=capture)
    with Engine(runner, Words(), eos_token_ids=[], max_batch=5) as engine:
        handles = engine.submit_all([greedy(prompt) for prompt in prompts()])
        assert [list(handle.result(timeout=60).token_ids) for handle in handles] == texts
    assert capture.replayed > NEW


@pytest.mark.parametrize("reuse", [True, False])
def test_pages_behind_the_window_are_free(model: tuple[Path, list[list[int]]], reuse: bool):
    """A text of twelve windows holds in a window's group what one window needs, and the whole text in the other. With
    reuse, the pages of a prompt are kept until its logits are known to be finite."""
    path, _ = model
    runner = open_model(path, 60)
    used: dict[str, int] = {}
    with Engine(runner, Words(), eos_token_ids=[], prefill_chunk=16, prefix_cache=reuse) as engine:
        scheduler, launch = engine._loop.scheduler, runner.launch

        def counted(step: Any) -> Any:
            for sequence in scheduler.running if not reuse or len(step.feeds[0].ids) == 1 else ():
                for name, layout in scheduler.cache._layouts.items():
                    held = len(layout.pages(sequence.held.by_group[name]))
                    used[name] = max(used.get(name, 0), held)
            return launch(step)

        runner.launch = counted  # type: ignore[method-assign]
        engine.submit(greedy([*range(200)], 50)).result(timeout=60)
    expected = {"full": 16, "window": 3}
    assert used == {group.name: expected[group.name] for group in runner.groups}


def test_a_window_takes_three_pages_for_any_text(tmp_path: Path):
    tiny_model(tmp_path, sliding_window=WINDOW, **MODELS["mistral"])
    ids = [random.Random(5).randrange(300) for _ in range(150)]
    texts = []
    for pages in (4, 200):
        with Engine(open_model(tmp_path, pages), Words(), eos_token_ids=[]) as engine:
            assert engine.max_context == 256
            texts.append(engine.submit(greedy(ids, 100)).result(timeout=60).token_ids)
    assert texts[0] == texts[1]


def test_a_budget_is_split_over_the_groups(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tiny_model(tmp_path, sliding_window=WINDOW, max_position_embeddings=4096, **MODELS["ministral"])
    runner, _ = load_runner(tmp_path, kv_cache="1MiB", progress=False, backend="cpu")
    with Engine(runner, Words(), eos_token_ids=[]) as engine:
        # A page of 16 positions is 8 KiB a layer: the full layer's and a window's share of 128 such pages.
        assert 100 * 16 < engine.max_context < 128 * 16
        assert "in its group 'full'" in engine.context_limit and "raise kv_cache, to 2.1MiB" in engine.context_limit
        done = engine.submit(greedy(prompts()[5] * 10, 50)).result(timeout=60)
        assert len(done.token_ids) == 50
    with pytest.raises(MemoryBudgetError, match="give at least 49152 bytes"):
        load_runner(tmp_path, kv_cache="40KiB", progress=False, backend="cpu")


def test_callers_that_name_pages_may_have_all_kept(tmp_path: Path):
    """Also where two groups share a pool, whose pages must not meet."""
    tiny_model(tmp_path, sliding_window=WINDOW, **MODELS["ministral in one pool"])
    runner, _ = load_runner(tmp_path, max_batch=1, progress=False, backend="cpu", keep_all=True)
    assert {group.kind for group in runner.groups} == {"pages"}
    assert runner.num_pages * 16 == 256
    ids = [random.Random(5).randrange(300) for _ in range(250)]
    pages = list(range(16))
    torch.testing.assert_close(
        feed(runner, ids, pages, [200, *[1] * 50])[-1], feed(runner, ids, pages[::-1], [250])[0], rtol=0, atol=0
    )
