"""Evaluate a checkpoint, alone or against a reference: perplexity on unseen text, KL, top-1 agreement, sizes, samples.

`cai eval DENSE SLIM`                 a candidate against its reference; either may be dense or slim
`cai eval MODEL`                      one model
`cai eval WHISPER SLIM --audio DIR`   speech models: word error rate
`cai eval MODEL --lm-eval DIR`        evaluate nothing; write scripts and tasks for EleutherAI's lm-evaluation-harness

The text is the last quarter of the Wikipedia sample, which calibration and tuning never use, or --text FILE.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cai_runtime.cli.options import add_device_argument

HELP = "perplexity, divergence, agreement and samples of one checkpoint, or of two side by side"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # These defaults repeat those of `judge.comparison`, whose import needs torch. A test compares them.
    parser.add_argument("reference", metavar="MODEL", help="a known name, a URI or a directory, as for `cai pull`")
    parser.add_argument(
        "candidate", metavar="CANDIDATE", nargs="?", help="model to compare with it, such as its slim checkpoint"
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        help='text, as `cai compress --calibration` takes it; default: "wikipedia", the sample\'s last quarter',
    )
    parser.add_argument(
        "--audio",
        action="append",
        metavar="PATH",
        help="for speech models: audio files, a directory of them, or a .jsonl or .tsv list with audio and text; "
        "repeatable. The transcript of a.wav may be a.txt beside it",
    )
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="of the text (default 8192)")
    parser.add_argument(
        "--window", type=int, default=512, metavar="N", help="tokens per window, each scored alone (default 512)"
    )
    parser.add_argument(
        "--prompts", metavar="FILE", help='for the samples: a prompt on each line, or .jsonl of objects with a "prompt"'
    )
    parser.add_argument("--no-samples", action="store_true", help="generate nothing")
    parser.add_argument("--max-tokens", type=int, default=48, metavar="N", help="of each sample (default 48)")
    parser.add_argument(
        "--backend",
        choices=("transformers", "engine"),
        default="transformers",
        help="what computes the logits: transformers on dense fp32 matrices (default, exact), or our engine, as users run "
        "the model",
    )
    parser.add_argument(
        "--keep",
        type=float,
        metavar="SHARE",
        help="open the elastic CANDIDATE, or a single elastic MODEL, at this keep",
    )
    add_device_argument(parser)
    parser.add_argument("--dtype", default="auto", help="fp32, bf16, fp16; default: fp32, or the engine's own choice")
    parser.add_argument(
        "--one-at-a-time",
        action="store_true",
        help="never load both models at once; store the first one's distributions on disk (default: if memory is short)",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all results as JSON, with each window's means")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="draw the comparison as PNG (extra: plot)")
    parser.add_argument(
        "--lm-eval", metavar="DIR", type=Path, help="only write scripts, tasks and arguments for lm-eval to DIR"
    )


def run(args: argparse.Namespace) -> int:
    if args.lm_eval is not None:
        return _export(args)
    if args.audio:
        return _hear(args)
    from cai_runtime.judge.picture import check_picture, draw_comparison

    if args.picture is not None:
        check_picture(args.picture)
    if args.json is not None:
        _require_file(args.json, "--json")
    prompts = [] if args.no_samples else None if args.prompts is None else read_prompts(args.prompts)
    import shutil

    from cai_runtime.judge.comparison import PROMPTS, compare

    comparison = compare(
        args.reference,
        args.candidate,
        text=args.text,
        tokens=args.tokens,
        window=args.window,
        prompts=PROMPTS if prompts is None else prompts,
        max_tokens=args.max_tokens,
        backend=args.backend,
        device=args.device,
        dtype=args.dtype,
        keep=args.keep,
        together=False if args.one_at_a_time else None,
    )
    print(comparison.table(shutil.get_terminal_size().columns))  # before the file: a full disk does not lose it
    if args.json is not None:
        _write(args.json, comparison.to_json())
    if args.picture is not None:
        draw_comparison(comparison, args.picture)
    return 0


def read_prompts(file: str | Path) -> list[str]:
    """The prompts of a file: its lines, or in .jsonl the "prompt" of each line. Raises CompressionError otherwise."""
    import json

    from cai_runtime.errors import CompressionError

    path = Path(file)
    try:
        # Not splitlines, which also splits at U+2028 and others; a prompt may hold them.
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        prompts = [json.loads(line)["prompt"] for line in lines] if path.suffix == ".jsonl" else lines
    except OSError as e:
        raise CompressionError(f"--prompts {path} can't be read: {e.strerror or e}") from e
    except (ValueError, KeyError, TypeError) as e:
        raise CompressionError(f'--prompts {path}: each line must be an object with a string "prompt" ({e})') from e
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise CompressionError(f"--prompts {path} holds no prompt, or one that is not text")
    return prompts


def _export(args: argparse.Namespace) -> int:
    from cai_runtime.convert.sources import pull
    from cai_runtime.errors import CompressionError
    from cai_runtime.judge.lm_eval_export import export_lm_eval

    if args.candidate is not None:
        raise CompressionError("--lm-eval takes one model: run it once for each, with a directory of its own")
    exported = export_lm_eval(pull(args.reference), args.lm_eval, text=args.text, device=args.device, dtype=args.dtype)
    print(f"{args.lm_eval}: {', '.join(exported.files)}\n\nrun it with\n\n{exported.command}")
    return 0


def _hear(args: argparse.Namespace) -> int:
    """Compare speech models on audio."""
    import shutil

    from cai_runtime.errors import CompressionError
    from cai_runtime.judge.speech_evaluation import compare_speech

    if args.text is not None or args.picture is not None or args.backend != "transformers":
        raise CompressionError(
            "--audio judges by transformers and draws nothing: leave --text, --picture, --backend out"
        )
    if args.json is not None:
        _require_file(args.json, "--json")
    comparison = compare_speech(
        args.reference, args.candidate, audio=args.audio, device=args.device, dtype=args.dtype, keep=args.keep
    )
    print(comparison.table(shutil.get_terminal_size().columns))
    if args.json is not None:
        _write(args.json, comparison.to_json())
    return 0


def _require_file(path: Path, option: str) -> None:
    """Raise CompressionError, before any work, for a path that can't be written as a file."""
    from cai_runtime.errors import CompressionError

    if path.is_dir():
        raise CompressionError(f"{option} {path} is a directory: name a file")
    if not path.absolute().parent.is_dir():
        raise CompressionError(f"{option} {path}: there is no directory {path.absolute().parent}")


def _write(path: Path, value: object) -> None:
    import json

    from cai_runtime.errors import CompressionError

    try:
        path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as e:
        raise CompressionError(f"--json {path} can't be written: {e.strerror or e}") from e
