"""The stages of a compression to an elastic checkpoint: round every layer to its forms, heal, write, judge at several
keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cai_runtime.audio.files import Source, split_clips
from cai_runtime.compressor.assemble import healed_parameters, module_report, write_rest
from cai_runtime.compressor.elastic.growth import ElasticPlan, PlannedModule, add_forms, elastic_forms, plan_elastic
from cai_runtime.compressor.elastic.heal import ElasticHealer, healed_forms, put_forms
from cai_runtime.compressor.factor.allocate import Curve
from cai_runtime.compressor.factor.cores import StoredModule
from cai_runtime.compressor.factor.decompose import OUTPUT_DAMPING, damped, factorize
from cai_runtime.compressor.factor.embedding_head import Ends
from cai_runtime.compressor.options import Options
from cai_runtime.compressor.report import Report
from cai_runtime.compressor.stats.block_stack import Batch
from cai_runtime.compressor.stats.calibrate import BlockId, CalibrationPass
from cai_runtime.compressor.stats.moments import BlockMoments
from cai_runtime.compressor.stats.targets import InputGroup, Target
from cai_runtime.compressor.train.blockwise import dense_weight
from cai_runtime.compressor.train.heal import HealSettings, dense_pair
from cai_runtime.compressor.work import Work
from cai_runtime.convert.cache import tqdm_disable
from cai_runtime.judge.comparison import compare_keeps, for_report
from cai_runtime.judge.comparison_result import Comparison
from cai_runtime.judge.speech_evaluation import compare_speech_keeps
from cai_runtime.judge.speech_evaluation import for_report as for_speech_report
from cai_runtime.judge.speech_result import SpeechComparison
from cai_runtime.slim.spec import STORES, ModuleSpec
from cai_runtime.slim.stores import CoreData
from cai_runtime.slim.writer import CheckpointWriter, record_quality
from cai_runtime.stock.load import DTYPES

STEP = "elastic"
FLOAT = "|float"  # suffix of an unrounded core's name in a step's file
JUDGED_KEEPS = 10  # the keeps k / 10 inside the range are judged, and both ends


def elastic_plan(curves: Mapping[str, Curve], options: Options) -> ElasticPlan:
    """The forms of every module, in the curves' order. Raises what `plan_elastic` raises."""
    assert options.keep is not None and options.smallest_keep is not None
    return plan_elastic(
        list(curves.values()),
        options.keep,
        smallest=options.smallest_keep,
        multiple=options.rank_multiple,
        floor=options.floor,
    )


class ElasticCompressor:
    """Rounds the layers of each block to their forms. The step "elastic-s-i" in the work directory holds them.

    store: of all cores. moments: as in `BlockwiseCompressor`. floats: also save the unrounded lowrank cores, from which
    healing starts. tick: called with the number of finished layers.
    """

    def __init__(
        self,
        calibration: CalibrationPass,
        plan: ElasticPlan,
        store: str,
        moments: Callable[[BlockId], tuple[list[InputGroup], BlockMoments]],
        work: Work,
        *,
        floats: bool = False,
        tick: Callable[[int], object] = lambda _n: None,
    ):
        self._calibration, self._plan, self._store, self._floats = calibration, plan, store, floats
        self._planned = {module.name: module for module in plan.modules}
        self._moments, self._work = moments, work
        self.tick = tick

    def run(self) -> None:
        """Round the layers of all blocks that are not in the work directory yet."""
        for at in self._calibration.blocks():
            targets = self._calibration.targets(at)
            if self._work.has(at.step(STEP)):
                self.tick(len(targets))
                continue
            groups, moments = self._moments(at)
            tensors: dict[str, torch.Tensor] = {}
            specs: dict[str, Any] = {}
            for target in (target for group in groups for target in group.targets):
                forms = self._forms(target, self._planned[target.name], moments)
                specs[target.name] = [form.spec.to_json() for form in forms]
                tensors |= _tensors(target.name, forms)
                tensors |= _floats(target.name, forms[-1]) if self._floats else {}
                self.tick(1)
            self._work.save(at.step(STEP), tensors, {"modules": specs, "rows": moments.rows})

    def _forms(self, target: Target, planned: PlannedModule, moments: BlockMoments) -> list[StoredModule]:
        weight = dense_weight(self._calibration.model, target)
        gram, outer = damped(moments.inputs[target.name]), moments.outputs.get(target.name)
        factors = None
        if planned.rank is not None:
            factors = factorize(weight, gram, None if outer is None else damped(outer, OUTPUT_DAMPING))
        forms = elastic_forms(planned, self._plan.step, weight, factors, gram, self._store)
        self._calibration.model.weights.release(f"{target.name}.weight")
        return forms


def load_forms(work: Work, at: BlockId) -> tuple[dict[str, list[StoredModule]], Any]:
    """A block's forms by layer name (see `elastic_forms`), and the record of its step."""
    tensors, record = work.load(at.step(STEP))
    layers: dict[str, list[StoredModule]] = {}
    for name, entries in record["modules"].items():
        specs = [ModuleSpec.from_json(name, entry) for entry in entries]
        layers[name] = [_form(tensors, name, spec) for spec in specs]
    return layers, record


def heal_elastic(
    calibration: CalibrationPass,
    plan: ElasticPlan,
    work: Work,
    batches: Sequence[Batch],
    options: Options,
    ends: Ends,
    *,
    tick: Callable[[], object],
) -> list[float]:
    """Train the lowrank cores for all keeps, see `elastic.heal`. The step "heal" in the work directory holds them.

    batches: as in `Healer`. Returns the divergence of each step at its keep, in nats per position.
    """
    weights = calibration.model.weights
    student, teacher = dense_pair(weights, options, ends)
    specs: dict[str, ModuleSpec] = {}
    stores: dict[str, tuple[str, ...]] = {}
    for at in calibration.blocks():
        layers, _ = load_forms(work, at)
        put_forms(student, layers, DTYPES[options.dtype], options.device)
        specs |= {name: forms[0].spec for name, forms in layers.items()}
        stores |= {name: forms[-1].spec.store for name, forms in layers.items()}
    settings = HealSettings.of(options, speech=weights.is_speech)
    healer = ElasticHealer(student, teacher, batches, work, settings, plan.table(stores), specs, tick=tick)
    healer.run()
    return healer.losses


def write_elastic(
    writer: CheckpointWriter,
    calibration: CalibrationPass,
    plan: ElasticPlan,
    ends: Ends,
    work: Work,
    curves: Mapping[str, Curve],
    report: Report,
    progress: bool | None,
) -> None:
    """Write all tensors and the elastic table. Fills in the report's modules and counts for the largest keep, and the counts
    of the second forms under "elastic". One block is in memory at a time."""
    weights = calibration.model.weights
    healed = healed_parameters(work)
    done: set[str] = set()
    seconds: dict[str, ModuleSpec] = {}
    for at in tqdm(calibration.blocks(), desc="write", unit="block", disable=tqdm_disable(progress)):
        layers, record = load_forms(work, at)
        for name, rounded in layers.items():
            forms = healed_forms(name, rounded, healed)
            bias = weights.tensor(f"{name}.bias") if f"{name}.bias" in weights else None
            add_forms(writer, weights.module_on_disk(name), forms, bias)
            spec = forms[0].spec
            if len(forms) == 2:
                seconds[name] = forms[1].spec
            report.modules.append(module_report(name, spec, curves[name], record["rows"][name] > 0))
            report.add(spec.dense_parameters, spec.parameters, spec.nbytes)
            done |= {f"{name}.weight", f"{name}.bias"}
            if bias is not None:
                report.add_rest(bias.numel(), bias.nbytes)
    write_rest(writer, calibration, done, {}, ends, report)
    table = plan.table({name: spec.store for name, spec in seconds.items()})
    modules = tuple(replace(module, name=weights.module_on_disk(module.name)) for module in table.modules)
    writer.set_elastic(replace(table, modules=modules))
    report.elastic = {
        "keep": list(plan.keep),
        "second_forms": {
            "modules": len(seconds),
            "parameters": sum(spec.parameters for spec in seconds.values()),
            "bytes": sum(spec.nbytes for spec in seconds.values()),
        },
        "quality": [],
    }


def judged_keeps(smallest: float, largest: float) -> list[float]:
    """The keeps to judge, falling: both ends, and the multiples of 0.1 between them."""
    tenths = [k / JUDGED_KEEPS for k in range(1, JUDGED_KEEPS + 1)]
    return sorted({smallest, largest, *(keep for keep in tenths if smallest < keep < largest)}, reverse=True)


def judge_keeps(dense: str | Path, slim: str | Path, report: Report, **options: Any) -> None:
    """Judge an elastic checkpoint against its source at `judged_keeps`. Writes the quality into the checkpoint's table.

    In the report, "quality" is that of the largest keep, and "elastic" has an entry per keep. The report is not written.

    options: of `compare`, without `keep` and `together`. Raises what `compare` and `record_quality` raise.
    """
    assert report.elastic is not None
    keeps = judged_keeps(*report.elastic["keep"])
    found = compare_keeps(dense, slim, keeps, **options)
    report.quality = for_report(found[0])
    report.elastic["quality"] = [
        {**_figures(keep, one), "samples": [{"prompt": s.prompt, "answer": s.candidate} for s in one.samples]}
        for keep, one in zip(keeps, found, strict=True)
    ]
    record_quality(slim, [_figures(keep, one) for keep, one in zip(keeps, found, strict=True)])


def judge_speech_keeps(
    dense: str | Path, slim: str | Path, calibration: Source, report: Report, *, progress: bool | None = None
) -> None:
    """`judge_keeps` for a Whisper, by word errors on the held-out clips (see `audio.files.split_clips`). Without held-out
    clips it does nothing. Raises what `compare_speech` and `record_quality` raise."""
    assert report.elastic is not None
    keeps, (_, clips) = judged_keeps(*report.elastic["keep"]), split_clips(calibration)
    if not clips:
        return
    found = compare_speech_keeps(dense, slim, keeps, audio=clips, progress=progress)
    report.quality = for_speech_report(found[0])
    report.elastic["quality"] = [_speech_figures(keep, one) for keep, one in zip(keeps, found, strict=True)]
    record_quality(slim, report.elastic["quality"])


def _speech_figures(keep: float, found: SpeechComparison) -> dict[str, float]:
    """Size and quality at one keep, without values that are not finite; "word_error" only with transcripts."""
    score, distance = found.candidate, found.divergence
    assert score is not None and distance is not None
    figures = {"keep": keep, "parameters": score.parameters, "bytes": score.nbytes}
    figures |= {} if score.word_error is None else {"word_error": score.word_error}
    figures |= {"kl": distance.kl, "top1": distance.top1}
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _figures(keep: float, found: Comparison) -> dict[str, float]:
    """Size and quality at one keep, without values that are not finite."""
    score, distance = found.candidate, found.divergence
    assert score is not None
    figures = {"keep": keep, "parameters": score.parameters, "bytes": score.nbytes, "perplexity": score.perplexity}
    if distance is not None:
        figures |= {"ratio": distance.ratio, "kl": distance.kl, "top1": distance.top1}
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _tensors(name: str, forms: list[StoredModule]) -> dict[str, torch.Tensor]:
    """The tensors of all forms by their names in the checkpoint, which differ between dense and lowrank forms."""
    return {
        f"{name}.{label}{suffix}": tensor
        for form in forms
        for label, core in zip(form.spec.core_names, form.cores, strict=True)
        for suffix, tensor in core.tensors.items()
    }


def _floats(name: str, form: StoredModule) -> dict[str, torch.Tensor]:
    """The unrounded cores of a lowrank form by name; empty for a dense form."""
    if form.spec.kind != "lowrank" or form.floats is None:
        return {}
    return {f"{name}.{k}{FLOAT}": core for k, core in zip(form.spec.core_names, form.floats, strict=True)}


def _form(tensors: Mapping[str, torch.Tensor], name: str, spec: ModuleSpec) -> StoredModule:
    """The inverse of `_tensors` and `_floats` for one form."""
    cores = []
    for label, shape, store in zip(spec.core_names, spec.core_shapes, spec.store, strict=True):
        parts = {suffix: tensors[f"{name}.{label}{suffix}"] for suffix in STORES[store].tensors(shape)}
        cores.append(CoreData(parts[""], parts.get("_scale"), store, parts.get("_zero"), shape))
    floats = [tensors[key] for label in spec.core_names if (key := f"{name}.{label}{FLOAT}") in tensors]
    return StoredModule(spec, cores, floats=floats or None)
