"""Dense checkpoint to slim checkpoint, stage by stage: text, calibrate, decompose, allocate, refine, heal, write,
report."""

from __future__ import annotations

import inspect
import logging
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from cai_runtime.compress.allocate import Allocation, Curve
from cai_runtime.compress.assemble import write_checkpoint
from cai_runtime.compress.blockwise import BlockSettings, BlockwiseCompressor, load_block
from cai_runtime.compress.calibrate import BlockId, CalibrationPass
from cai_runtime.compress.calibration import SELF, Source, calibration_sequences
from cai_runtime.compress.choices import Choice, choose
from cai_runtime.compress.comparison import quality
from cai_runtime.compress.curves import Noise, curves_of, measure
from cai_runtime.compress.elastic import ElasticPlan
from cai_runtime.compress.elastic_run import (
    ElasticCompressor,
    elastic_plan,
    heal_elastic,
    judge_keeps,
    judge_speech_keeps,
    write_elastic,
)
from cai_runtime.compress.heal import Healer
from cai_runtime.compress.moments import BlockMoments
from cai_runtime.compress.options import BATCH, DTYPES, Options
from cai_runtime.compress.plan import Plan, make_plan, measured_rate, versions
from cai_runtime.compress.plan_file import PlanSource
from cai_runtime.compress.report import Report
from cai_runtime.compress.speech import calibration_batches
from cai_runtime.compress.speech_evaluation import speech_quality
from cai_runtime.compress.stack import Batch, open_model
from cai_runtime.compress.student import put_in
from cai_runtime.compress.targets import InputGroup, find_targets
from cai_runtime.compress.weights import DenseWeights
from cai_runtime.compress.work import Work
from cai_runtime.convert.cache import tqdm_disable
from cai_runtime.convert.sources import pull
from cai_runtime.errors import CompressionError
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.slim.spec import Kind
from cai_runtime.slim.writer import CheckpointWriter, replace_report

logger = logging.getLogger(__name__)

MOMENT_BYTES = 4 << 30  # of all blocks' moments together that are kept on disk; more are computed twice


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
            0: none. Default 2; with `elastic` none.
        heal_tokens: tokens on which the whole model is trained to predict what the original does; 0: none. Default
            65,536; with `elastic` none. Needs both models in memory, and three times the compressed one for the optimizer.
        calibration: see `cai_runtime.compress.calibration.calibration_sequences`. None: "self", the model's own text. A
            speech model takes audio, see `cai_runtime.compress.speech.speech_samples`, and has no default.
        samples, sequence_length: sequences to calibrate and refine on, and tokens in each. Healing takes further ones. For a
            speech model windows of 30 s, and the most tokens of a text; a window counts as so many of `heal_tokens`.
        embedding_store: store of the token embedding and the head (None: as `store`, but int8 with the int4 stores: 4
            bits hurt there, where nothing makes up for the rounding). They stay dense.
        rank_multiple: ranks are multiples of this. None: 16, which keeps the rows of 8-bit cores aligned for vector
            loads; with an int4 store its group, of which otherwise a part would be wasted.
        floor: pooled: every layer keeps at least this share of `keep` (elastic: of `smallest_keep`).
        plan: instead of a budget: a plan file, or its "modules", that says what every layer becomes, see
            `cai_runtime.compress.plan_file`.
        elastic: make one checkpoint that opens at any keep from `smallest_keep` to `keep`, see
            `cai_runtime.compress.elastic`. Lowrank and pooled, one store, neither shifted nor refined. The file holds many
            layers in two forms.
        smallest_keep: None: 0.3 with `elastic`.
        device: "cpu" or "cuda[:n]", where the model runs and is decomposed.
        dtype: in which the model runs. None: bf16 on CUDA; on the CPU fp32, but for the products of healing, which are of
            bf16 where the processor has instructions for them.
        seed: draws the calibration sequences, and the order of training.
        evaluate: judge the result against the source on text that calibration has not seen, for the report's "quality": see
            `cai_runtime.compress.comparison.quality`; of a speech model on every tenth clip, at most 64 in all
            (`speech.split_clips`), see `speech_evaluation.speech_quality`. Both are held in memory. An elastic one is judged
            at several keeps, one after the other (`elastic_run.judge_keeps`).
        overwrite: replace `dst`.
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
    options = Options.of(
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
    path = pull(src, progress=progress)
    with Checkpoint.open(path) as checkpoint:
        # A destination that is taken is known before hours of work.
        CheckpointWriter(dst, config=checkpoint.config, overwrite=overwrite).abort()
        weights = DenseWeights(checkpoint)
        outlook = make_plan(weights, options, Path(dst))
        outlook.require_room()
        run = _Run(str(src), Path(dst), weights, options, outlook, progress, evaluate=evaluate)
        report = run.run(overwrite=overwrite, restart=restart)
    if evaluate:
        start = perf_counter()
        if weights.is_speech:
            assert options.calibration is not None  # the plan has asked for it
            if elastic:
                judge_speech_keeps(path, dst, options.calibration, report, progress=progress)
            else:
                report.quality = speech_quality(path, dst, options.calibration, progress=progress)
        elif elastic:
            judge_keeps(path, dst, report, progress=progress)
        else:
            report.quality = quality(path, dst, progress=progress)
        report.seconds["evaluate"] = round(perf_counter() - start, 3)
        replace_report(dst, report.to_json())
    return report


def dry_run(src: str | Path, dst: str | Path, *, progress: bool | None = None, **options: Any) -> tuple[Plan, float]:
    """What `compress` would do with these options: the plan, and the floating point operations a second that this
    machine was seen to do, for `Plan.summary` and `Plan.seconds`. The source is fetched; nothing is written.

    Raises what `compress` raises before its work, but for a full disk or memory: the plan tells.
    """
    with Checkpoint.open(pull(src, progress=progress)) as checkpoint:
        return make_plan(DenseWeights(checkpoint), options_of(**options), Path(dst)), measured_rate()


def options_of(**options: Any) -> Options:
    """What `compress` makes of these options of its own, as the report has them, with the defaults of all others. Raises
    CompressionError, which names the option."""
    others = {"src", "dst", "evaluate", "overwrite", "restart", "progress"}
    parameters = inspect.signature(compress).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if name not in others}
    return Options.of(**{**defaults, **options})


class _Run:
    """One compression, from its work directory."""

    def __init__(
        self,
        source: str,
        dst: Path,
        weights: DenseWeights,
        options: Options,
        plan: Plan,
        progress: bool | None,
        *,
        evaluate: bool,
    ):
        self._source, self._dst, self._weights = source, dst.absolute(), weights
        self._options, self._plan, self._progress = options, plan, progress
        self._planned, self._evaluate = plan.choices, evaluate

    def run(self, *, overwrite: bool, restart: bool) -> Report:
        options = self._options
        start = perf_counter()
        hashes = self._weights.hashes()
        hashed = perf_counter() - start
        key = {"options": asdict(options), "source": hashes, "versions": versions(), "threads": torch.get_num_threads()}
        directory = self._dst.with_name(f".{self._dst.name}.work")
        with ExitStack() as stack:
            work = Work(directory, key, restart=restart)
            stack.callback(work.close)
            work.watch.add("hash", hashed)
            with work.watch.stage("text"):
                batches, extra, text = self._text(work)
            with work.watch.stage("open"):
                model = open_model(self._weights, dtype=DTYPES[options.dtype], device=options.device)
                targets = find_targets(model.model, [s.name for s in model.stacks], self._weights)
            calibration = CalibrationPass(model, targets, batches, work)
            self._calibrate(calibration, work)
            with work.watch.stage("allocate"):
                curves, noise = self._curves(calibration, work)
                forms = elastic_plan(curves, options) if options.elastic else None
                if forms is None:
                    choices = self._planned or choose(
                        curves, options, noise=noise, budget_bytes=self._plan.layer_budget_bytes
                    )
            if forms is not None:
                losses = self._compress_elastic(calibration, forms, extra, work)
            else:
                self._compress_blocks(calibration, choices, work)
                losses = self._heal(calibration, extra, work)
            report = Report(
                source=self._source,
                source_sha256=hashes,
                options=asdict(options),
                calibration=text,
                versions=versions(),
                healing=losses,
            )
            with (
                work.watch.stage("write"),
                CheckpointWriter(
                    self._dst, config=self._weights.config(), source_dir=self._weights.path, overwrite=overwrite
                ) as writer,
            ):
                if forms is not None:
                    write_elastic(writer, calibration, forms, work, curves, options, report, self._progress)
                else:
                    write_checkpoint(writer, calibration, work, curves, options, report, self._progress)
                report.seconds = work.watch.seconds()
                writer.finish(report.to_json())
            work.remove()
        return report

    def _text(self, work: Work) -> tuple[list[Batch], list[Batch], dict[str, Any]]:
        """Batches to calibrate on, batches to heal on (those and more), and what they are."""
        options = self._options
        if self._weights.is_speech:
            return calibration_batches(self._weights, options, work, self._progress, judged=self._evaluate)
        if not work.has("text"):
            found = calibration_sequences(
                SELF if options.calibration is None else options.calibration,
                tokenizer=_tokenizer(self._weights.path),
                model_path=self._weights.path,
                samples=max(options.samples, -(-options.heal_tokens // options.sequence_length)),
                sequence_length=options.sequence_length,
                seed=options.seed,
                device=options.device,
                progress=self._progress,
            )
            order = torch.randperm(found.sequences.shape[0], generator=torch.Generator().manual_seed(options.seed))
            record = {**found.to_json(), "calibrated_on": min(options.samples, len(order))}
            work.save("text", {"sequences": found.sequences[order].contiguous()}, record)
        tensors, record = work.load("text")
        batches = [{"input_ids": ids} for ids in tensors["sequences"][: options.samples].split(BATCH)]
        every = [{"input_ids": ids} for ids in tensors["sequences"].split(BATCH)]
        return batches, every, record

    def _calibrate(self, calibration: CalibrationPass, work: Work) -> None:
        """Forward and backward; per block the curves of its layers and, where there is room, their moments."""
        blocks = calibration.blocks()
        curvature = self._options.curvature
        keep_moments = self._plan.moment_bytes <= MOMENT_BYTES

        def visit(at: BlockId) -> None:
            if work.has(at.step("curves")) and (not curvature or work.has(at.step("grad"))):
                return
            groups, moments = self._kept_moments(calibration, work, at) or calibration.moments(at, gradients=curvature)
            with work.watch.stage("decompose"):
                targets = [target for group in groups for target in group.targets]
                energies, found = measure(self._weights, targets, moments, self._options, self._planned)
            record = {"groups": [[t.name for t in g.targets] for g in groups], "rows": moments.rows, **found}
            if keep_moments:
                work.save(at.step("moments"), moments.tensors(groups), record)
            work.save(at.step("curves"), energies, record)

        with work.watch.stage("calibrate"):
            with self._bar(len(blocks), "forward", "block") as bar:
                calibration.tick = bar.update
                calibration.forward()
            with self._bar(len(blocks), "backward" if curvature else "moments", "block") as bar:
                calibration.tick = bar.update
                if curvature:
                    calibration.backward(visit)
                else:
                    for at in blocks:
                        visit(at)
                        bar.update()

    def _moments(self, calibration: CalibrationPass, work: Work, at: BlockId) -> tuple[list[InputGroup], BlockMoments]:
        return self._kept_moments(calibration, work, at) or calibration.moments(at, gradients=self._options.curvature)

    def _kept_moments(
        self, calibration: CalibrationPass, work: Work, at: BlockId
    ) -> tuple[list[InputGroup], BlockMoments] | None:
        """A block's moments from disk, where they are."""
        if not work.has(at.step("moments")):
            return None
        tensors, record = work.load(at.step("moments"))
        by_name = {target.name: target for target in calibration.targets(at)}
        groups = [InputGroup(tuple(by_name[name] for name in names)) for names in record["groups"]]
        return groups, BlockMoments.of(tensors, groups, record["rows"])

    def _curves(self, calibration: CalibrationPass, work: Work) -> tuple[dict[str, Curve], Noise]:
        """Of every layer, the errors by rank, and what rounding to the competing stores adds to them."""
        curves: dict[str, Curve] = {}
        noise: Noise = {}
        for at in calibration.blocks():
            found = curves_of(calibration.targets(at), *work.load(at.step("curves")), self._options)
            curves |= found[0]
            noise |= found[1]
        return curves, noise

    def _compress_blocks(self, calibration: CalibrationPass, choices: dict[str, Choice], work: Work) -> None:
        options = self._options
        settings = BlockSettings(
            options.shift, options.refine_epochs, options.refine_rate, options.curvature, options.seed
        )

        def moments(at: BlockId) -> tuple[list[InputGroup], BlockMoments]:
            return self._moments(calibration, work, at)

        with work.watch.stage("blocks"):
            compressor = BlockwiseCompressor(calibration, choices, moments, work, settings)
            total = sum(compressor.ticks(at) for at in calibration.blocks())
            with self._bar(total, "blocks", "step") as bar:
                compressor.tick = bar.update
                compressor.run()

    def _compress_elastic(
        self, calibration: CalibrationPass, plan: ElasticPlan, batches: list[Batch], work: Work
    ) -> list[float]:
        options = self._options

        def moments(at: BlockId) -> tuple[list[InputGroup], BlockMoments]:
            return self._moments(calibration, work, at)

        with work.watch.stage("blocks"), self._bar(len(plan.modules), "blocks", "layer") as bar:
            floats = options.heal_tokens > 0
            ElasticCompressor(calibration, plan, options.stores[0], moments, work, floats=floats, tick=bar.update).run()
        steps = options.heal_tokens // (BATCH * options.sequence_length)
        if not steps:
            return []
        with work.watch.stage("heal"), self._bar(steps, "heal", "step") as bar:
            return heal_elastic(calibration, plan, work, batches, options, steps=steps, tick=bar.update)

    def _heal(self, calibration: CalibrationPass, batches: list[Batch], work: Work) -> list[float]:
        options = self._options
        steps = options.heal_tokens // (BATCH * options.sequence_length)
        if not steps:
            return []
        with work.watch.stage("heal"):
            student = self._student(calibration, work)
            teacher = self._weights.resident(DTYPES[options.dtype]).to(options.device)
            with self._bar(steps, "heal", "step") as bar:
                healer = Healer(
                    student,
                    teacher,
                    batches,
                    work,
                    steps=steps,
                    rate=options.heal_rate,
                    mixed=options.mixed,
                    batches_per_step=BATCH if self._weights.is_speech else 1,  # whose batches are of one window
                    tick=bar.update,
                )
                healer.run()
        return healer.losses

    def _student(self, calibration: CalibrationPass, work: Work) -> nn.Module:
        """The compressed model, its cores, norms and biases to be trained."""
        options = self._options
        student: Any = self._weights.resident(DTYPES[options.dtype]).to(options.device)
        for at in calibration.blocks():
            for name, layer in load_block(work, at)[0].items():
                put_in(student, name, layer.to(options.device))
        for module in {student.get_input_embeddings(), student.get_output_embeddings()}:
            module.weight.data = self._weights.rounded(module.weight.data, options.embedding_store)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_("cores." in name or parameter.ndim == 1)
        return student

    def _bar(self, total: int, name: str, unit: str) -> tqdm:
        return tqdm(total=total, desc=name, unit=unit, disable=tqdm_disable(self._progress))


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise CompressionError(f"the tokenizer of {path} can't be loaded: {e}") from e
