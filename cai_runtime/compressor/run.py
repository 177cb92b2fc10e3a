"""One compression in its work directory, stage by stage: text, calibrate, decompose, allocate, refine, heal, write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from tqdm import tqdm

from cai_runtime.compressor.assemble import write_checkpoint
from cai_runtime.compressor.data.calibration import SELF, calibration_sequences
from cai_runtime.compressor.data.speech import calibration_batches
from cai_runtime.compressor.elastic.growth import ElasticPlan
from cai_runtime.compressor.elastic.run import ElasticCompressor, elastic_plan, heal_elastic, write_elastic
from cai_runtime.compressor.factor.allocate import Curve
from cai_runtime.compressor.factor.choice import Choice
from cai_runtime.compressor.factor.choices import choose
from cai_runtime.compressor.factor.curves import Noise, curves_of, measure
from cai_runtime.compressor.factor.embedding_head import Ends, find_ends
from cai_runtime.compressor.factor.plan import MOMENT_BYTES, Plan, versions
from cai_runtime.compressor.options import BATCH, Options
from cai_runtime.compressor.report import Report
from cai_runtime.compressor.stats.block_stack import Batch, BlockModel, open_model
from cai_runtime.compressor.stats.calibrate import BlockId, CalibrationPass
from cai_runtime.compressor.stats.moments import BlockMoments
from cai_runtime.compressor.stats.survey import check_blocks
from cai_runtime.compressor.stats.targets import InputGroup, Target, find_targets
from cai_runtime.compressor.stats.uncompressed import Left
from cai_runtime.compressor.stats.weights import DenseWeights
from cai_runtime.compressor.train.blockwise import BlockSettings, BlockwiseCompressor, load_block
from cai_runtime.compressor.train.heal import Healer, HealSettings, dense_pair
from cai_runtime.compressor.train.student import replace_module
from cai_runtime.compressor.work import Work, work_directory
from cai_runtime.convert.cache import tqdm_disable
from cai_runtime.errors import CheckpointError, CompressionError, TensorMissingError, UnsupportedModelError
from cai_runtime.slim.reader import REPORT_FILE, read_json
from cai_runtime.slim.writer import CheckpointWriter
from cai_runtime.stock.guard import as_compression_error
from cai_runtime.stock.load import DTYPES

WRITTEN = "written"  # a step: the report as written to the destination


class Run:
    """One compression. `open_work` opens its work directory, `run` runs all stages in it."""

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
        self._source, self._dst, self._weights = source, dst, weights
        self._options, self._plan, self._progress = options, plan, progress
        self._planned, self._evaluate = plan.choices, evaluate
        self._hashes: dict[str, str] = {}

    def open_work(self, *, restart: bool) -> Work:
        """The locked work directory. Raises what `Work` raises."""
        start = perf_counter()
        self._hashes = self._weights.hashes(self._progress)
        hashed = perf_counter() - start
        key = {"options": asdict(self._options), "source": self._hashes, "versions": versions()}
        work = Work(work_directory(self._dst), {**key, "threads": torch.get_num_threads()}, restart=restart)
        work.watch.add("hash", hashed)
        return work

    def written(self, work: Work) -> Report | None:
        """The report at the destination, if an earlier, interrupted call with the same key wrote that checkpoint; else
        None."""
        if not work.has(WRITTEN):
            return None
        try:
            found = read_json(self._dst / REPORT_FILE)
        except CheckpointError:
            return None
        return Report.of_json(found) if _unjudged(found) == _unjudged(work.load(WRITTEN)[1]) else None

    def run(self, work: Work, *, overwrite: bool) -> Report:
        """Run all stages, except finished steps, and write the checkpoint. The work directory keeps what `written` needs."""
        options, hashes = self._options, self._hashes
        with work.watch.stage("text"):
            batches, extra, text = self._text(work)
        with work.watch.stage("open"):
            model = open_model(self._weights, dtype=DTYPES[options.dtype], device=options.device)
            found = find_targets(model.model, [s.name for s in model.stacks], self._weights)
            targets, read = self._called(model, found, batches, work)
        calibration = CalibrationPass(model, targets, batches, work)
        self._calibrate(calibration, work)
        with work.watch.stage("calibrate"):
            known = options.embedding_store
            ends = find_ends(calibration, (known,) if known else options.stores, work, compete=known is None)
        with work.watch.stage("allocate"):
            curves, noise = self._curves(calibration, work)
            forms = elastic_plan(curves, options) if options.elastic else None
            choices = {} if forms is not None else self._planned or self._choose(model, curves, noise, ends, read)
            ends = replace(ends, stores={name: known or choices.pop(name).store for name in ends.names})
        if forms is not None:
            losses = self._compress_elastic(calibration, forms, extra, ends, work)
        else:
            self._compress_blocks(calibration, choices, work)
            losses = self._heal(calibration, extra, ends, work)
        report = Report(
            source=self._source,
            source_sha256=hashes,
            options=asdict(options),
            calibration=text,
            versions=versions(),
            healing=losses,
            ends=ends.stores,
            left=Left.of(model.model, self._weights, targets, read).parameters,
            read=sorted(read),
        )
        with (
            work.watch.stage("write"),
            CheckpointWriter(
                self._dst, config=self._weights.config(), source_dir=self._weights.path, overwrite=overwrite
            ) as writer,
        ):
            if forms is not None:
                write_elastic(writer, calibration, forms, ends, work, curves, report, self._progress)
            else:
                write_checkpoint(writer, calibration, ends, work, curves, report, self._progress)
            report.seconds = work.watch.seconds()
            work.save(
                WRITTEN, {}, report.to_json(), again=True
            )  # before `finish`, so that a kill in between is harmless
            writer.finish(report.to_json())
        work.keep_only(WRITTEN)
        return report

    def _called(
        self, model: BlockModel, targets: dict[str, Target], batches: list[Batch], work: Work
    ) -> tuple[dict[str, Target], set[str]]:
        """The targets to compress, and the names of those whose weights the model reads without calling the layer.

        Raises what `check_blocks` raises; UnsupportedModelError when no target can be compressed, CompressionError when the
        plan factorizes a layer that must stay dense.
        """
        if not work.has("survey"):
            work.save("survey", {}, sorted(check_blocks(model, targets, batches[0], heal=self._options.heal_steps > 0)))
        read = set(work.load("survey")[1])
        called = {name: target for name, target in targets.items() if name not in read}
        if not called:
            raise UnsupportedModelError(
                f"{type(model.model).__name__} reads the weights of all its linear layers itself "
                f"({', '.join(sorted(read)[:4])} ..): nothing of it can be factorized. Take a model of another architecture"
            )
        for name in sorted(read):
            if self._planned is not None and self._planned[name].rank is not None:
                raise CompressionError(
                    f"the plan factorizes {name}, whose weight the model reads itself: let it be dense there"
                )
        return called, read

    def _text(self, work: Work) -> tuple[list[Batch], list[Batch], dict[str, Any]]:
        """Batches for calibration, batches for healing, and the record for the report. Healing uses unused sequences first:
        refined blocks have already fitted the calibration text."""
        options = self._options
        if self._weights.is_speech:
            return calibration_batches(self._weights, options, work, self._progress, judged=self._evaluate)
        if not work.has("text"):
            found = calibration_sequences(
                SELF if options.calibration is None else options.calibration,
                tokenizer=_tokenizer(self._weights.path),
                model_path=self._weights.path,
                samples=options.text_samples,
                sequence_length=options.sequence_length,
                seed=options.seed,
                device=options.device,
                progress=self._progress,
            )
            order = torch.randperm(found.sequences.shape[0], generator=torch.Generator().manual_seed(options.seed))
            record = {**found.to_json(), "calibrated_on": min(options.samples, len(order))}
            work.save("text", {"sequences": found.sequences[order].contiguous()}, record)
        tensors, record = work.load("text")
        known, others = tensors["sequences"][: options.samples], tensors["sequences"][options.samples :]
        batches, further = (
            [{"input_ids": ids} for ids in part.split(BATCH)] for part in (known, torch.cat([others, known]))
        )
        return batches, further, record

    def _calibrate(self, calibration: CalibrationPass, work: Work) -> None:
        """The forward and backward pass. Saves each block's curves and, if they fit on disk, its moments."""
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
        """A block's groups and moments from the work directory; None if they were not saved."""
        if not work.has(at.step("moments")):
            return None
        tensors, record = work.load(at.step("moments"))
        by_name = {target.name: target for target in calibration.targets(at)}
        groups = [InputGroup(tuple(by_name[name] for name in names)) for names in record["groups"]]
        return groups, BlockMoments.of(tensors, groups, record["rows"])

    def _curves(self, calibration: CalibrationPass, work: Work) -> tuple[dict[str, Curve], Noise]:
        """The curves of all layers, and the error that rounding to the competing stores adds."""
        curves: dict[str, Curve] = {}
        noise: Noise = {}
        for at in calibration.blocks():
            found = curves_of(calibration.targets(at), *work.load(at.step("curves")), self._options)
            curves |= found[0]
            noise |= found[1]
        return curves, noise

    def _choose(
        self, model: BlockModel, curves: dict[str, Curve], noise: Noise, ends: Ends, read: set[str]
    ) -> dict[str, Choice]:
        shapes: dict[str, tuple[int, int]] = {name: model.model.get_submodule(name).weight.shape for name in ends.noise}
        budget = self._plan.layer_budget_bytes
        if budget is not None:  # the plan's budget includes layers that turned out to stay dense
            budget -= sum(self._weights.nbytes(f"{name}.weight") for name in read)
        return choose(curves, self._options, noise=noise | ends.noise, budget_bytes=budget, ends=shapes)

    def _compress_blocks(self, calibration: CalibrationPass, choices: dict[str, Choice], work: Work) -> None:
        options = self._options
        settings = BlockSettings(
            options.shift, options.refine_epochs, options.refine_rate, options.mixed, options.curvature, options.seed
        )
        moments = partial(self._moments, calibration, work)
        with work.watch.stage("blocks"):
            compressor = BlockwiseCompressor(calibration, choices, moments, work, settings)
            total = sum(compressor.ticks(at) for at in calibration.blocks())
            with self._bar(total, "blocks", "step") as bar:
                compressor.tick = bar.update
                compressor.run()

    def _compress_elastic(
        self,
        calibration: CalibrationPass,
        plan: ElasticPlan,
        batches: list[Batch],
        ends: Ends,
        work: Work,
    ) -> list[float]:
        options = self._options
        moments = partial(self._moments, calibration, work)
        with work.watch.stage("blocks"), self._bar(len(plan.modules), "blocks", "layer") as bar:
            floats = options.heal_tokens > 0
            ElasticCompressor(calibration, plan, options.stores[0], moments, work, floats=floats, tick=bar.update).run()
        if not options.heal_steps:
            return []
        with work.watch.stage("heal"), self._bar(options.heal_steps, "heal", "step") as bar:
            return heal_elastic(calibration, plan, work, batches, options, ends, tick=bar.update)

    def _heal(self, calibration: CalibrationPass, batches: list[Batch], ends: Ends, work: Work) -> list[float]:
        options, steps = self._options, self._options.heal_steps
        if not steps:
            return []
        with work.watch.stage("heal"):
            student, teacher = dense_pair(self._weights, options, ends)
            for at in calibration.blocks():
                for name, layer in load_block(work, at)[0].items():
                    replace_module(student, name, layer.to(options.device))
            for name, parameter in student.named_parameters():
                parameter.requires_grad_("cores." in name or parameter.ndim == 1)
            settings = HealSettings.of(options, speech=self._weights.is_speech)
            with self._bar(steps, "heal", "step") as bar:
                healer = Healer(student, teacher, batches, work, settings, tick=bar.update)
                healer.run()
        return healer.losses

    def _bar(self, total: int, name: str, unit: str) -> tqdm:
        return tqdm(total=total, desc=name, unit=unit, disable=tqdm_disable(self._progress))


@contextmanager
def nothing_left(work: Work) -> Iterator[None]:
    """Removes the work directory when the model can't be compressed at all: a later call can't use it."""
    try:
        yield
    except (UnsupportedModelError, TensorMissingError):
        work.remove()
        raise


def _unjudged(report: dict[str, Any]) -> dict[str, Any]:
    """A report without quality and evaluation time, which differ between the report in the work directory and on disk."""
    found = {**report, "quality": None, "seconds": {**report.get("seconds", {}), "evaluate": None}}
    if isinstance(found.get("elastic"), dict):
        found["elastic"] = {**found["elastic"], "quality": None}
    return found


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    with as_compression_error(f"the tokenizer of {path} can't be loaded"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
