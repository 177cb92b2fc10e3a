"""Dense checkpoint to slim checkpoint: what is asked for, the run (`run.py`), and the judgement of its result."""

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

    Killed at any moment, the same call goes on where it was, from the work directory `.DST.work` beside `dst`, and
    comes to the same checkpoint bit for bit (on the same machine, with the same number of threads).

    Args:
        src: a known name, a URI or a directory (see `cai_runtime.convert.sources.pull`), dense or slim already.
        dst: the directory to make.
        keep: parameters of the linear layers to keep, as a share of their dense count, in (0, 1]. Default 0.8, unless
            `target_bytes` is given; of an elastic checkpoint the largest, default 1.
        target_bytes: instead of `keep`: size of the weights of the whole checkpoint, in bytes, as text with a unit
            ("80MB", "1.5GiB"), or as a share of their size in bf16 ("45%"). Rank, kind and store are chosen for each layer.
        store: how cores lie on disk: fp32, bf16, fp16, int8, or 4 bits with a scale for every 32, 64 or 128 columns:
            int4-g32, int4-g64 (also called int4), int4-g128, each with "-zp" behind it for zero points, too. Default
            int8; with `target_bytes`, int8 and int4-g64 compete unless one is named.
        kind: "interpolative" (the default); "lowrank": a much lower rank at the same keep, but one that holds all smaller
            ones (the default with `elastic`); "mpo", a matrix product operator of two cores; or "dense": with
            `target_bytes`, quantization alone.
        allocation: "pooled" lets the layers compete for parameters, "uniform" gives each the same share.
        curvature: weigh errors by what they do to the loss, from a backward pass over the calibration text. False: by
            the layers' outputs alone.
        shift: fit every layer to the inputs that the compressed layers before it give. With little text it fits the text
            instead: SmolLM2-135M on 8,192 tokens gets worse by it.
        refine_epochs: passes over the calibration text in which each block is trained to give the dense block's output;
            0: none. Default 2; none with `elastic`, nor where a language model of a keep of 0.7 or more is healed.
        heal_tokens: tokens on which the whole model is trained to predict what the original does; 0: none. Default
            65,536; with `elastic` none. Needs both models in memory, and three times the compressed one for the optimizer.
        calibration: see `compressor.data.calibration.calibration_sequences`. None: "self", the model's own text. A speech
            model takes audio, see `compressor.data.speech.speech_samples`, and has no default.
        samples, sequence_length: sequences to calibrate and refine on, and tokens in each. Healing takes further ones.
            For a speech model windows of 30 s, and the most tokens of a text; a window counts as so many of `heal_tokens`.
        embedding_store: store of the token embedding and the head, which stay dense. None: as `store`, but int8 with the
            int4 stores (4 bits cost more there than in the layers); with `target_bytes` and no `store` what the budget is
            best spent on.
        rank_multiple: ranks are multiples of this. None: 16, which keeps the rows of 8-bit cores aligned for vector
            loads; with an int4 store its group, of which otherwise a part would be wasted.
        floor: pooled: every layer keeps at least this share of `keep` (elastic: of `smallest_keep`).
        plan: instead of a budget: a plan file, or its "modules", that says what every layer becomes, see
            `cai_runtime.compressor.factor.plan_file`.
        elastic: make one checkpoint that opens at any keep from `smallest_keep` to `keep`, see
            `compressor.elastic.growth`. Lowrank and pooled, one store, neither shifted nor refined. The file holds many
            layers in two forms.
        smallest_keep: None: 0.3 with `elastic`.
        device: "cpu" or "cuda[:n]", where the model runs and is decomposed.
        dtype: in which the model runs. None: bf16 on CUDA; on the CPU fp32, but for the products of training, which are
            of bf16 where the processor has instructions for them.
        seed: draws the calibration sequences, and the order of training.
        evaluate: judge the result against the source on text that calibration has not seen, for the report's "quality": see
            `cai_runtime.judge.comparison.quality`; of a speech model on every tenth clip, at most 64 in all
            (`audio.files.split_clips`), see `speech_evaluation.speech_quality`. Both are held in memory. An elastic one is
            judged at several keeps, one after the other (`elastic.run.judge_keeps`).
        overwrite: replace `dst`, once the new checkpoint is complete. A directory that is no checkpoint is left alone.
        restart: throw away what an earlier call with other options left unfinished.
        progress: bars on stderr; None shows them on a terminal only.

    Memory: embedding and head, one block with the moments of its layers, and the text's hidden states at one block.
    Healing: see there. Disk, beside the result: hidden states and gradients of the text before every block, 8 bytes *
    tokens * hidden size * blocks in fp32, the trainable cores (4 bytes a parameter), and up to 4 GiB of moments.

    Returns the report that is also written as slim_report.json.

    Raises:
        CompressionError: an option is out of range, the calibration text is bad, the disk is too full, or the work
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
    options_for()  # what is wrong with them is known before anything is fetched
    place = destination(dst)
    path = pull(src, progress=progress)

    def check_place(config: dict[str, Any]) -> None:
        CheckpointWriter(place, config=config, source_dir=path, overwrite=overwrite).abort()

    with ExitStack() as stack:
        stack.enter_context(plain_torch())
        with Checkpoint.open(path) as checkpoint:
            weights = DenseWeights(checkpoint)
            options = options_for(speech=weights.is_speech)
            # A destination that is taken is known before hours of work; it may be by what an earlier call wrote.
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
    """Judge the finished checkpoint, into the report. Raises CompressionError, which says that it is finished."""
    try:
        if speech:
            assert options.calibration is not None  # the plan has asked for it
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
    """What `compress` would do with these options: the plan, and the floating point operations a second that this
    machine was seen to do, for `Plan.summary` and `Plan.seconds`. The source is fetched; nothing is written.

    Raises what `compress` raises before its work, but for a full disk or memory: the plan tells.
    """
    options_of(**options)
    place = destination(dst)
    path = pull(src, progress=progress)
    with Checkpoint.open(path) as checkpoint:
        if not was_begun(work_directory(place)):  # else the place may be taken by what is to go on
            check_destination(place, source=path, overwrite=overwrite)
        weights = DenseWeights(checkpoint)
        return make_plan(weights, options_of(**options, speech=weights.is_speech), place), measured_rate()


def options_of(*, speech: bool = False, **options: Any) -> Options:
    """What `compress` makes of these options of its own for a model (of speech, or not), as the report has them, with the
    defaults of all others. Raises CompressionError, which names the option."""
    others = {"src", "dst", "evaluate", "overwrite", "restart", "progress"}
    parameters = inspect.signature(compress).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if name not in others}
    return Options.of(**{**defaults, **options}, speech=speech)
