"""The table that comparisons of text and of speech share."""

import math
from types import SimpleNamespace

from cai_runtime.judge.score_table import ScoreTable, checkpoint_name, plus_minus


def score(path="runs/slim", slim=True, keep=None, parameters=500, nbytes=2e6):
    return SimpleNamespace(path=path, slim=slim, keep=keep, parameters=parameters, nbytes=nbytes)


def test_one_checkpoint_has_neither_candidate_nor_ratio():
    table = ScoreTable(score())
    assert table.ratio("parameters") == ""
    assert [line.split() for line in table.lines()] == [
        ["model"], ["runs/slim", "(slim)"], ["parameters", "500"], ["bytes", "on", "disk", "2.0", "MB"],
    ]  # fmt: skip


def test_a_candidate_stands_beside_its_reference():
    table = ScoreTable(score("a/dense", slim=False, parameters=1000), score(keep=0.5))
    table.add_divergence("KL", "0.1" + plus_minus(0.01, ".2f"), "note")
    heading, names, parameters, _, kl = table.lines()
    assert heading.split() == ["reference", "candidate"]
    assert names.split() == ["a/dense", "runs/slim", "at", "keep", "0.5", "(slim)"]
    assert parameters.split() == ["parameters", "1,000", "500", "0.500", "x"]
    assert kl.split() == ["KL", "0.1", "±", "0.01", "note"]


def test_a_name_that_says_nothing_takes_its_directory_s():
    assert checkpoint_name(score("runs/a/model", slim=False)) == "a/model"
    assert checkpoint_name(score("runs/whisper", slim=False)) == "whisper"


def test_no_standard_error_is_shown_as_nothing():
    assert plus_minus(None, ".2f") == plus_minus(math.nan, ".2f") == ""
