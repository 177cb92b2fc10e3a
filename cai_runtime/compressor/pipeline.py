"""`compress`: checks the options, runs the compression (`run.py`), and judges the result."""

from __future__ import annotations

import inspect
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from cai_runtime.compressor.data.calibration import Source
from cai_runtime.compressor.elastic.run import judge_keeps, judge_speech_keeps
from cai_runtime.compressor.factor.allocate import Allocation
from cai_runtime.compressor.factor.plan import Plan, make_plan, measured_rate
from cai_runtime.compressor.factor.plan_file import PlanSource
from cai_runtime.compressor.option_types import plain
from cai_runtime.compressor.options import Options
from cai_runtime.compressor.report import Report
from cai_runtime.compressor.run import WRITTEN, Run, nothing_left
from cai_runtime.compressor.stats.weights import DenseWeights
from cai_runtime.compressor.work import bytes_held, was_begun, work_directory
from cai_runtime.convert.sources import pull
from cai_runtime.errors import CaiError, CompressionError
from cai_runtime.judge.comparison import quality
from cai_runtime.judge.speech_evaluation import speech_quality
from cai_runtime.slim.destination import check_destination, destination
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.slim.spec import Kind
from cai_runtime.slim.writer import CheckpointWriter, replace_report
from cai_runtime.stock.torch_state import plain_torch


def compress(
    src: str | Path,
    dst: str | Path,
    *,
    keep: float | None = None,
    target_bytes: int | str | None = None,
    store: str | None = None,
    kind: Kind | None = None,
    allocation: Allocation = "pooled",
    curvature: bool = True,
    shift: bool = False,
    refine_epochs: int | None = None,
    heal_tokens: int | None = None,
    calibration: Source | None = None,
    samples: int = 48,
    sequence_length: int = 512,
    embedding_store: str | None = None,
    rank_multiple: int | None = None,
    floor: float = 0.25,
    plan: PlanSource | None = None,
    elastic: bool = False,
    smallest_keep: float | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    seed: int = 0,
    evaluate: bool = True,
    overwrite: bool = False,
    restart: bool = False,
    progress: bool | None = None,
) -> Report:
    """Compress a causal language model, or a Whisper, to a slim checkpoint.

    After a kill at any moment, the same call resumes from the work directory `.DST.work` beside `dst`. The resulting
    checkpoint is bitwise the same (on the same machine, with the same number of threads).

    Args:
        src: a known name, a URI or a directory (see `cai_runtime.convert.sources.pull`), dense or slim.
        dst: the directory to create.
        keep: parameters of the linear layers over their dense count, in (0, 1]. Default 0.8, unless `target_bytes` is
            given. Of an elastic checkpoint the largest keep, default 1.
        target_bytes: instead of `keep`: size of all weights of the checkpoint, in bytes, as text with a unit ("80MB",
            "1.5GiB"), or as a share of their size in bf16 ("45%"). Each layer's rank (or dense) and store are chosen.
        store: number format of the cores: fp32, bf16, fp16, int8, or 4 bits with one scale per 32, 64 or 128 columns:
            int4-g32, int4-g64 (alias int4), int4-g128. A suffix "-zp" adds zero points. Default int8; with `target_bytes`,
            int8 and int4-g64 compete.
        kind: "interpolative" (the default); "lowrank" (the default with `elastic`): a lower rank at the same keep, but
            truncatable to all smaller ranks; "mpo": a matrix product operator of two cores; "dense": with `target_bytes`,
            quantization alone.
        allocation: "pooled": layers compete for parameters. "uniform": every layer gets the same share.
        curvature: weight errors by their effect on the loss, from a backward pass over the calibration text. False: by the
            layers' outputs alone.
        shift: fit every layer to the inputs that the compressed layers before it give. Overfits a small text: it makes
            SmolLM2-135M worse on 8,192 tokens.
        refine_epochs: passes over the calibration text in which each block is trained to reproduce the dense block's
            output. Default 2. Default 0 with `elastic`, or for a language model with healing at keep 0.7 or more.
        heal_tokens: tokens on which the whole model is distilled from the original; 0: none. Default 65,536; with `elastic`
            0. Needs both models in memory, and three times the compressed one for the optimizer.
        calibration: see `compressor.data.calibration.calibration_sequences`. None: "self", text that the model writes. A
            speech model needs audio, see `compressor.data.speech.speech_samples`.
        samples, sequence_length: number of sequences for calibration and refinement, and their length in tokens. Healing
            uses further sequences. For a speech model the number of 30 s windows, and the most tokens of a transcript;
            every `sequence_length` of `heal_tokens` asks for one more window, and half as many steps hear 8 of them each.
        embedding_store: store of embedding and head, which stay dense. None: as `store`, but int8 with int4 stores (4 bits
            cost more there than in the layers). With `target_bytes` and without `store`, chosen under the budget.
        rank_multiple: ranks are multiples of this. None: 16, which aligns the rows of 8-bit cores for vector loads; with an
            int4 store its group size, so that no group is partly used.
        floor: pooled: every layer keeps at least this share of `keep` (elastic: of `smallest_keep`).
        plan: instead of a budget: a plan file, or its "modules", with the choice for every layer, see
            `cai_runtime.compressor.factor.plan_file`.
        elastic: make one checkpoint that opens at any keep from `smallest_keep` to `keep`, see
            `compressor.elastic.growth`. Requires kind "lowrank", pooled allocation, no shift and no refinement. The file
            has many layers in two forms.
        smallest_keep: with `elastic`. None: 0.3.
        device: "cpu" or "cuda[:n]", where the model runs and is decomposed.
        dtype: of the model's computation. None: bf16 on CUDA. On the CPU fp32, with bf16 matrix products in training if the
            processor has instructions for them.
        seed: for sampling the calibration text and the order of training batches.
        evaluate: judge the result against the source on text outside the calibration, for the report's "quality" (see
            `cai_runtime.judge.comparison.quality`). A speech model is judged on every tenth clip, at most 64
            (`audio.files.split_clips`, `speech_evaluation.speech_quality`). Both models are in memory. An elastic
            checkpoint is judged at several keeps in turn (`elastic.run.judge_keeps`).
        overwrite: replace `dst` once the new checkpoint is complete. A directory that is not a checkpoint is never replaced.
        restart: discard the unfinished work of an earlier call with other options.
        progress: bars on stderr; None: on a terminal only.

    Memory: embedding and head, one block with the moments of its layers, and the text's hidden states at one block; while
    healing, see `heal_tokens`. Disk, beside the result: hidden states and gradients before every block (8 bytes * tokens *
    hidden size * blocks in fp32), trainable cores (4 bytes per parameter), and up to 4 GiB of moments.

    Returns the report that is also written as slim_report.json.

    Raises:
        CompressionError: an option is out of range, the calibration text is unusable, the disk is too full, or the work
            directory belongs to a call with other options.
        SourceError, CheckpointError, UnsupportedModelError: the source can't be fetched, read, or factorized.
        CheckpointWriteError: `dst` exists or can't be written.
    """
    plain({"evaluate": evaluate, "overwrite": overwrite, "restart": restart, "progress": progress})
    options_for = partial(
        Options.of,
        keep=keep,
        target_bytes=target_bytes,
        store=store,
        kind=kind,
        allocation=allocation,
        curvature=curvature,
        shift=shift,
        refine_epochs=refine_epochs,
        heal_tokens=heal_tokens,
        calibration=calibration,
        samples=samples,
        sequence_length=sequence_length,
        embedding_store=embedding_store,
        rank_multiple=rank_multiple,
        floor=floor,
        plan=plan,
        elastic=elastic,
        smallest_keep=smallest_keep,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    options_for()  # raises for invalid options before anything is fetched
    place = destination(dst)
    path = pull(src, progress=progress)

    def check_place(config: dict[str, Any]) -> None:
        CheckpointWriter(place, config=config, source_dir=path, overwrite=overwrite).abort()

    with ExitStack() as stack:
        stack.enter_context(plain_torch())
        with Checkpoint.open(path) as checkpoint:
            weights = DenseWeights(checkpoint)
            options = options_for(speech=weights.is_speech)
            # Check the destination before hours of work. It may hold the result of an earlier, interrupted call.
            taken_by_us = was_begun(work_directory(place), WRITTEN)
            if not taken_by_us:
                check_place(checkpoint.config)
            outlook = make_plan(weights, options, place)
            if not taken_by_us:
                outlook.require_room(bytes_held(work_directory(place)))
            run = Run(str(src), place, weights, options, outlook, progress, evaluate=evaluate)
            work = stack.enter_context(closing(run.open_work(restart=restart)))
            report = run.written(work)
            if report is None:
                check_place(checkpoint.config)
                with nothing_left(work):
                    report = run.run(work, overwrite=overwrite)
        if evaluate and report.quality is None:
            start = perf_counter()
            _judge(path, place, weights.is_speech, options, report, progress)
            report.seconds["evaluate"] = round(perf_counter() - start, 3)
            replace_report(place, report.to_json())
        work.remove()
    return report


def _judge(src: Path, dst: Path, speech: bool, options: Options, report: Report, progress: bool | None) -> None:
    """Judge the finished checkpoint and fill in the report's quality. Raises CompressionError when judging fails."""
    try:
        if speech:
            assert options.calibration is not None  # checked by `make_plan`
            if options.elastic:
                judge_speech_keeps(src, dst, options.calibration, report, progress=progress)
            else:
                report.quality = speech_quality(src, dst, options.calibration, progress=progress)
        elif options.elastic:
            judge_keeps(src, dst, report, progress=progress)
        else:
            report.quality = quality(src, dst, progress=progress)
    except CaiError as e:
        raise CompressionError(
            f"the checkpoint {dst} is complete, but judging it failed: {e}. Run the same command again, or leave this out "
            "(--no-evaluation)"
        ) from e


def dry_run(
    src: str | Path, dst: str | Path, *, overwrite: bool = False, progress: bool | None = None, **options: Any
) -> tuple[Plan, float]:
    """The plan of `compress` with these options, and this machine's measured FLOP/s for `Plan.summary` and `Plan.seconds`.
    Fetches the source; writes nothing.

    Raises what `compress` raises before its work, except for insufficient disk or memory, which the plan states.
    """
    options_of(**options)
    place = destination(dst)
    path = pull(src, progress=progress)
    with Checkpoint.open(path) as checkpoint:
        if not was_begun(work_directory(place)):  # an interrupted call may have written the destination
            check_destination(place, source=path, overwrite=overwrite)
        weights = DenseWeights(checkpoint)
        return make_plan(weights, options_of(**options, speech=weights.is_speech), place), measured_rate()


def options_of(*, speech: bool = False, **options: Any) -> Options:
    """The full `Options` that `compress` derives from these options. speech: for a speech model. Raises CompressionError,
    which names the option."""
    others = {"src", "dst", "evaluate", "overwrite", "restart", "progress"}
    parameters = inspect.signature(compress).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if name not in others}
    return Options.of(**{**defaults, **options}, speech=speech)
