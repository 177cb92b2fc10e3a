"""Writes files that run EleutherAI's lm-evaluation-harness on a checkpoint: arguments, scripts, and tasks without network
access."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_runtime.errors import CompressionError

ROLLING, LAST_WORD = "cai_unseen_text", "cai_last_word"
MAX_DOCUMENT = 4000  # characters; --limit counts documents, so they must be short
PASSAGE_WORDS = (30, 150)  # fewest and most words before the last one

_ROLLING_TASK = """\
# Perplexity of text that calibration has not seen, rolling over documents of a few thousand characters.
task: cai_unseen_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: @FILE@
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
metadata:
  version: 1.0
"""
_LAST_WORD_TASK = """\
# The last word of a paragraph that has been in it before, after LAMBADA (Paperno et al. 2016) without its human filter.
task: cai_last_word
dataset_path: json
dataset_kwargs:
  data_files:
    test: @FILE@
test_split: test
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{' ' + word}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
_SCRIPT = '''\
"""Runs lm-evaluation-harness on a cai_runtime checkpoint: python run.py [TASK ...]  (pip install 'cai-runtime[lm-eval]')"""

import json
import sys
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

import cai_runtime.judge.lm_eval  # noqa: F401  makes the model "cai" known

here = Path(__file__).resolve().parent
results = lm_eval.simple_evaluate(
    model="cai",
    model_args=json.loads((here / "model_args.json").read_text()),
    batch_size="auto",
    device={device!r},
    tasks=sys.argv[1:] or {tasks!r},
    task_manager=TaskManager(include_path=str(here / "tasks")),
    apply_chat_template=False,  # True for tasks that ask a chat model questions: {template}
    bootstrap_iters=1000,
)
results.pop("samples", None)
print(make_table(results))
(here / "results.json").write_text(json.dumps(results, indent=2, default=str))
'''

_SHELL = """\
#!/bin/sh
# pip install 'cai-runtime[lm-eval]'; add --apply_chat_template for tasks that ask a chat model questions
exec {command} "$@"
"""


@dataclass(frozen=True)
class Exported:
    """The written files, relative to `directory`, the command that runs them, and the names of the tasks."""

    directory: Path
    files: tuple[str, ...]
    command: str
    tasks: tuple[str, ...]


def export_lm_eval(
    model: str | Path,
    directory: str | Path,
    *,
    text: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Exported:
    """Write run.py, run.sh, model_args.json, the chat template if there is one, and two tasks into `directory`.

    The tasks are rolling perplexity and the last word of paragraphs, over `text` (see `eval_text.read_text`). They need no
    network access. lm-eval need not be installed to write them. The directory is created if it is missing.

    Raises:
        CheckpointError: `model` is not a checkpoint.
        CompressionError: the text has no paragraphs, or `directory` is the checkpoint's or can't be written.
    """
    from cai_runtime.judge.eval_text import read_text
    from cai_runtime.slim.reader import Checkpoint

    model, directory = Path(model).absolute(), Path(directory).absolute()
    with Checkpoint.open(model):
        pass
    if directory.resolve() == model.resolve():
        raise CompressionError(f"{directory} is the checkpoint itself: give lm-eval's files a directory of their own")
    document = read_text(text)
    pieces = [{"text": piece} for whole in document.texts for piece in _pieces(whole)]
    passages = [found for whole in document.texts for line in whole.split("\n") if (found := _last_word(line))]
    tasks = tuple(name for name, docs in ((ROLLING, pieces), (LAST_WORD, passages)) if docs)
    if not tasks:
        raise CompressionError(f"{document.source}: the text has nothing to evaluate on")
    arguments: dict[str, Any] = {"pretrained": str(model), "dtype": dtype}
    template = _chat_template(model)
    # Not in model_args: the harness passes its own --device to the model.
    where = None if device == "auto" else device
    command = " ".join(
        [
            "python -m cai_runtime.judge.lm_eval run --model cai",
            # As JSON, because a comma in a path would split the harness's own key=value form.
            f"--model_args {shlex.quote(json.dumps(arguments))}",
            f"--include_path {shlex.quote(str(directory / 'tasks'))} --tasks {','.join(tasks)}",
            "--batch_size auto",  # the harness's own default is one sequence at a time
            *([] if where is None else [f"--device {where}"]),
        ]
    )
    files = {
        "run.py": _SCRIPT.format(
            device=where,
            tasks=list(tasks),
            template="chat_template.jinja" if template else "this one has no chat template",
        ),
        "run.sh": _SHELL.format(command=command),
        "model_args.json": json.dumps(arguments, indent=2) + "\n",
    }
    if template:
        files["chat_template.jinja"] = template
    for name, docs, task in ((ROLLING, pieces, _ROLLING_TASK), (LAST_WORD, passages, _LAST_WORD_TASK)):
        if docs:
            data = directory / "tasks" / f"{name}.jsonl"
            files[f"tasks/{name}.yaml"] = task.replace("@FILE@", json.dumps(str(data)))
            files[f"tasks/{name}.jsonl"] = "".join(json.dumps(doc, ensure_ascii=False) + "\n" for doc in docs)
    try:
        (directory / "tasks").mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (directory / name).write_text(content, encoding="utf-8")
        (directory / "run.sh").chmod(0o755)
    except OSError as e:
        raise CompressionError(f"{directory} can't be written: {e.strerror or e}") from e
    return Exported(directory, tuple(files), command, tasks)


def _pieces(text: str) -> list[str]:
    """Split a text between paragraphs into documents of at most `MAX_DOCUMENT` characters. A longer paragraph stays
    whole."""
    pieces: list[str] = []
    for paragraph in text.split("\n"):
        if pieces and len(pieces[-1]) + 1 + len(paragraph) <= MAX_DOCUMENT:
            pieces[-1] += "\n" + paragraph
        else:
            pieces.append(paragraph)
    return [piece.strip() for piece in pieces if piece.strip()]


def _last_word(paragraph: str) -> dict[str, str] | None:
    """The last word that ends a sentence and occurs earlier in the paragraph, and the text before it; None if none
    does."""
    for found in reversed(list(re.finditer(r" ([A-Za-z]{3,})[.!?](?= |$)", paragraph))):
        context, word = paragraph[: found.start()], found[1]
        words = re.findall(r"[A-Za-z]+", context)
        if PASSAGE_WORDS[0] <= len(words) <= PASSAGE_WORDS[1] and word in words:
            return {"context": context, "word": word}
    return None


def _chat_template(model: Path) -> str | None:
    from cai_runtime.engine.open import load_tokenizer

    template = getattr(load_tokenizer(model), "chat_template", None)
    return template if isinstance(template, str) else None
