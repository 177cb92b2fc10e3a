"""Log likelihoods of given texts by the engine's runner: what perplexity and multiple-choice tasks ask for."""

import pytest
import torch

from cai_runtime.errors import CompressionError
from cai_runtime.judge import judges
from cai_runtime.judge.judges import EngineJudge, open_judge
from cai_runtime.stock.load import dense_reference

TEXTS = [([5, 9, 3, 44, 17], 2), ([8, 2], 1), ([3] * 40, 1), (list(range(2, 60)), 30), ([7, 7, 7, 7], 4), ([11], 1)]


@pytest.fixture(scope="module")
def judge(make_tiny):
    path = make_tiny(max_position_embeddings=64)
    with EngineJudge(path, device="cpu", progress=False) as found:
        found.path = path
        yield found


def test_log_likelihoods_are_their_definition(judge):
    model = dense_reference(judge.path)
    seen = []
    for (ids, first), (value, greedy) in zip(TEXTS, judge.log_likelihoods(TEXTS, lambda: seen.append(1)), strict=True):
        said = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        wanted = [(float(said[t - 1, ids[t]]), int(said[t - 1].argmax()) == ids[t]) for t in range(first, len(ids))]
        assert value == pytest.approx(sum(v for v, _ in wanted), abs=1e-3)
        assert greedy == all(g for _, g in wanted)
    assert len(seen) == len(TEXTS)


def test_greedy_is_what_generation_gives(judge):
    prompt = [5, 9, 3]
    answer = judge.continue_greedily(prompt, 5)
    assert len(answer) == 5
    other = [*answer[:-1], (answer[-1] + 1) % 60]
    [(likely, yes), (_, no)] = judge.log_likelihoods([([*prompt, *answer], 3), ([*prompt, *other], 3)])
    assert yes and not no and likely < 0


def test_a_text_does_not_depend_on_the_others(judge, monkeypatch):
    together = judge.log_likelihoods(TEXTS)
    assert judge.log_likelihoods(TEXTS[::-1]) == together[::-1]
    assert [judge.log_likelihoods([text])[0] for text in TEXTS] == together
    monkeypatch.setattr(judges, "PROMPT_CHUNK", 16)  # passes of one page, and the long text in parts
    assert judge.log_likelihoods(TEXTS) == together


def test_logits_in_parts_are_the_logits(judge, monkeypatch):
    ids = list(range(2, 42))
    whole = judge.logits(torch.tensor(ids))
    assert whole.shape == (40, 62)
    monkeypatch.setattr(judges, "PROMPT_CHUNK", 16)
    assert torch.equal(torch.cat(list(judge.logits_in_parts(ids))), whole)
    assert torch.equal(torch.cat(list(judge.logits_in_parts(ids, first=18))), whole[18:])


def test_the_last_token_needs_no_place(judge):
    [(value, _)] = judge.log_likelihoods([([3] * 65, 64)])
    assert value < 0
    for text in (([3] * 66, 1), ([3, 62], 1), ([3, 4], 0), ([3, 4], 3)):
        with pytest.raises(CompressionError):
            judge.log_likelihoods([text])


def test_both_judges_answer_alike(judge):
    with open_judge(judge.path, device="cpu") as exact:
        assert exact.max_context == judge.max_context == 64
        for prompt in ([5, 9, 3], [2]):
            assert exact.continue_greedily(prompt, 8) == judge.continue_greedily(prompt, 8)
    with pytest.raises(RuntimeError, match="closed"):
        exact.logits(torch.tensor([1]))


def test_engine_options_are_for_the_engine(judge):
    with pytest.raises(CompressionError, match="activations"):
        open_judge(judge.path, activations="int8")
