"""Dense checkpoint to slim checkpoint, stage by stage: calibrate, decompose, allocate, write, report."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from tqdm import tqdm

from cai_runtime.compress.allocate import Allocation, Curve, allocate
from cai_runtime.compress.calibrate import gather_moments
from cai_runtime.compress.calibration import load_calibration, sample_sequences, tokenize
from cai_runtime.compress.cores import dense_module, factorized_module
from cai_runtime.compress.decompose import OUTPUT_DAMPING, Factors, damped, factorize
from cai_runtime.compress.evaluate import dense_reference
from cai_runtime.compress.options import DTYPES, Options
from cai_runtime.compress.report import ModuleReport, Report
from cai_runtime.compress.targets import InputGroup, Target, find_targets, group_by_input
from cai_runtime.convert.cache import sha256_of, tqdm_disable
from cai_runtime.convert.sources import pull
from cai_runtime.errors import CompressionError, UnsupportedModelError
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.slim.spec import DENSE_REFERENCE_BYTES, STORES, Kind, ModuleSpec, canonical_store
from cai_runtime.slim.writer import CheckpointWriter

logger = logging.getLogger(__name__)

PROBE_TOKENS = 8  # enough for one forward pass that shows which layers share an input


def compress(
    src: str | Path,
    dst: str | Path,
    *,
    keep: float = 0.8,
    store: str = "int8",
    kind: Kind = "interpolative",
    allocation: Allocation = "pooled",
    curvature: bool = True,
    calibration: str | Path | None = None,
    samples: int = 16,
    sequence_length: int = 512,
    embedding_store: str | None = None,
    rank_multiple: int = 16,
    floor: float = 0.25,
    device: str = "cpu",
    dtype: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Report:
    """Compress a dense causal language model to a slim checkpoint.

    Args:
        src: a known name, a URI or a directory (see `cai_runtime.convert.sources.pull`).
        dst: the directory to make.
        keep: parameters of the linear layers to keep, as a share of their dense count, in (0, 1].
        store: how cores lie on disk: fp32, bf16, fp16, int8, or 4 bits with a scale for every 32, 64 or 128 columns:
            int4-g32, int4-g64 (also called int4), int4-g128, each with "-zp" behind it for zero points, too.
        kind: "interpolative", or "lowrank" (a much lower rank at the same keep).
        allocation: "pooled" lets the layers compete for parameters, "uniform" gives each the same share.
        curvature: weigh errors by what they do to the loss, from a backward pass over the calibration text. False: by the
            layers' outputs alone, in half the time; SmolLM2-135M at keep 0.8, pooled: 2.1 times the dense perplexity
            instead of 1.25.
        calibration: a .txt file, or a .jsonl file of objects with a "text"; None: half of the Wikipedia sample.
        samples, sequence_length: how much of it: sequences, and tokens in each.
        embedding_store: store of the token embedding and the head (None: as `store`, but int8 with the int4 stores: 4 bits
            hurt there, where nothing makes up for the rounding). They stay dense.
        rank_multiple: ranks are multiples of this; 16 keeps the rows of 8-bit cores aligned for vector loads. With an int4
            store, a multiple of the group wastes no part of a group's scale.
        floor: pooled: every layer keeps at least this share of `keep`.
        device: "cpu" or "cuda[:n]", where the model runs and is decomposed.
        dtype: in which the model runs (None: fp32 on the CPU, bf16 on CUDA).
        seed: draws the calibration sequences; everything else is deterministic.
        overwrite: replace `dst`.
        progress: bars on stderr; None shows them on a terminal only.

    Memory: the model in `dtype`, up to 8 GiB of moments, and in fp32 about 1.5 times the linear layers for their factors
    plus one [in, in] matrix for each input.

    Returns the report that is also written as slim_report.json.

    Raises:
        CompressionError: an option is out of range, the calibration file is bad, the source is slim already, or the disk is
            too full.
        SourceError, CheckpointError, UnsupportedModelError: the source can't be fetched, read, or factorized.
        CheckpointWriteError: `dst` exists or can't be written.
    """
    store = canonical_store(store)
    if embedding_store is None:
        embedding_store = "int8" if store in STORES and STORES[store].bits == 4 else store
    options = Options(
        keep=keep,
        store=store,
        kind=kind,
        allocation=allocation,
        curvature=curvature,
        embedding_store=canonical_store(embedding_store),
        samples=samples,
        sequence_length=sequence_length,
        rank_multiple=rank_multiple,
        floor=floor,
        device=device,
        dtype=dtype or ("bf16" if device.startswith("cuda") else "fp32"),
        seed=seed,
    )
    seconds: dict[str, float] = {}
    with _timed(seconds, "open"):
        path = pull(src, progress=progress)
    with Checkpoint.open(path) as checkpoint:
        if checkpoint.is_slim:
            raise CompressionError(f"{path} is a slim checkpoint already: compress the dense model it was made from")
        # The writer first: a destination that is taken is known before minutes of work.
        with CheckpointWriter(dst, config=checkpoint.config, source_dir=path, overwrite=overwrite) as writer:
            _require_room(checkpoint, options, Path(dst))
            with _timed(seconds, "open"):
                text = load_calibration(calibration, progress=progress)
                model = dense_reference(path, dtype=DTYPES[options.dtype], device=options.device)
                sequences = sample_sequences(
                    tokenize(_tokenizer(path), text.texts), options.samples, options.sequence_length, seed=options.seed
                )
                targets = find_targets(model, checkpoint)
                probe = sequences[:1, :PROBE_TOKENS].to(options.device)
                groups = group_by_input(model, targets, probe)
            decomposed = _decompose(model, checkpoint, groups, sequences, options, seconds, progress)
            embeddings = _embedding_names(model)
            del model
            with _timed(seconds, "allocate"):
                ranks = _ranks(decomposed, options)
            with _timed(seconds, "hash"):
                hashes = _hashes(checkpoint)
            report = Report(
                source=str(src),
                source_sha256=hashes,
                options=asdict(options),
                calibration={"source": text.source, "sequences": sequences.shape[0], "tokens": sequences.numel()},
                versions={name: importlib.metadata.version(name) for name in ("cai-runtime", "torch", "transformers")},
                seconds=seconds,
            )
            with _timed(seconds, "round"):
                _write(writer, checkpoint, decomposed, ranks, embeddings, options, report, progress)
            seconds.update({stage: round(took, 3) for stage, took in seconds.items()})
            writer.finish(report.to_json())
    return report


@dataclass(frozen=True)
class _Decomposed:
    """A target's factors, on the CPU; the damped Gram matrix of its inputs, fp32 [in, in], one for the whole group; whether
    the calibration text reached it."""

    factors: Factors
    input_gram: torch.Tensor
    calibrated: bool


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + perf_counter() - start


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise CompressionError(f"the tokenizer of {path} can't be loaded: {e}") from e


def _require_room(checkpoint: Checkpoint, options: Options, dst: Path) -> None:
    """Refuse before the work what the disk can't hold. An estimate from above: everything at the wider of its stores."""
    size = max(STORES[store].bytes_per_number for store in (options.store, options.embedding_store))
    numbers = sum(math.prod(info.shape) for info in checkpoint.tensors().values())
    need = int(numbers * size * 1.05)
    parent = next(p for p in dst.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < need:
        raise CompressionError(f"{parent} has {free >> 20} MiB free, the slim checkpoint needs up to {need >> 20} MiB")


def _decompose(
    model: Any,
    checkpoint: Checkpoint,
    groups: list[InputGroup],
    sequences: torch.Tensor,
    options: Options,
    seconds: dict[str, float],
    progress: bool | None,
) -> dict[str, _Decomposed]:
    """Factors of every target by name. A group's moments are dropped as soon as its weights are factorized."""
    found: dict[str, _Decomposed] = {}
    total = sum(len(group.targets) for group in groups)
    moments = gather_moments(model, groups, sequences, gradients=options.curvature, progress=progress)
    with tqdm(total=total, desc="decompose", unit="layer", disable=tqdm_disable(progress)) as bar:
        while True:
            with _timed(seconds, "calibrate"):
                group = next(moments, None)
            if group is None:
                return found
            with _timed(seconds, "decompose"):
                gram = damped(group.input_gram)
                kept = gram.float().cpu()
                for target in group.group.targets:
                    outer = group.output_grams.get(target.name)
                    factors = factorize(
                        _weight(checkpoint, target), gram, None if outer is None else damped(outer, OUTPUT_DAMPING)
                    )
                    found[target.name] = _Decomposed(factors.to("cpu"), kept, group.tokens > 0)
                    bar.update()


def _weight(checkpoint: Checkpoint, target: Target) -> torch.Tensor:
    """The target's weight as it lies on disk: the model may hold it in another dtype."""
    weight, shape = checkpoint.tensor(f"{target.name}.weight"), target.module.weight.shape
    if weight.shape != shape:
        raise UnsupportedModelError(
            f"{target.name} is {list(weight.shape)} on disk, {list(shape)} in transformers' model"
        )
    return weight


def _ranks(decomposed: dict[str, _Decomposed], options: Options) -> dict[str, int | None]:
    """Rank of every target; None where it stays dense."""
    curves = []
    for name, found in decomposed.items():
        factors = found.factors
        # With curvature the errors are estimates of the loss and add up as they are; without, each layer's own outputs
        # are the only measure there is.
        errors = factors.errors() if options.curvature else factors.relative_errors()
        curves.append(Curve(name, factors.left.shape[0], factors.right.shape[1], errors))
    ranks = allocate(
        curves,
        options.keep,
        kind=options.kind,
        allocation=options.allocation,
        multiple=options.rank_multiple,
        floor=options.floor,
    )
    return dict(zip(decomposed, ranks, strict=True))


def _write(
    writer: CheckpointWriter,
    checkpoint: Checkpoint,
    decomposed: dict[str, _Decomposed],
    ranks: dict[str, int | None],
    embeddings: set[str],
    options: Options,
    report: Report,
    progress: bool | None,
) -> None:
    """Round every target to its cores and hand all tensors of the checkpoint to the writer: targets as cores, embedding and
    head in their store, the rest as it is. Fills in the report's modules and counts."""
    owned = {tensor for name in decomposed for tensor in checkpoint.module_tensors(name)}
    disable = tqdm_disable(progress)
    for name, found in tqdm(decomposed.items(), desc="round", unit="layer", disable=disable):
        module, rank = checkpoint.module(name), ranks[name]
        weight, gram = module.dense().to(options.device), found.input_gram.to(options.device)
        if rank is None:
            stored = dense_module(weight, options.store, gram)
        else:
            factors = found.factors.to(options.device)
            stored = factorized_module(options.kind, weight, factors, rank, options.store, gram)
        spec = stored.spec
        writer.add_module(name, spec, stored.cores, pivot=stored.pivot, bias=module.bias)
        report.modules.append(
            ModuleReport(
                name=name,
                kind=spec.kind,
                rank=rank,
                out_features=spec.out_features,
                in_features=spec.in_features,
                parameters=spec.parameters,
                nbytes=spec.nbytes,
                relative_error=0.0 if rank is None else found.factors.relative_errors()[rank],
                calibrated=found.calibrated,
            )
        )
        report.dense_parameters += spec.dense_parameters
        report.parameters += spec.parameters
        report.dense_bytes += spec.dense_nbytes
        report.bytes += spec.nbytes
        checkpoint.release(checkpoint.module_tensors(name))
    report.total_dense_parameters, report.total_parameters = report.dense_parameters, report.parameters
    report.total_dense_bytes, report.total_bytes = report.dense_bytes, report.bytes
    for name, info in checkpoint.tensors().items():
        module_name, _, leaf = name.rpartition(".")
        tensor = checkpoint.tensor(name)
        count, nbytes = math.prod(info.shape), info.nbytes
        if name in owned:
            if leaf != "bias":
                continue
        elif leaf == "weight" and module_name in embeddings:
            rows, width = info.shape
            spec = ModuleSpec("dense", rows, width, None, (options.embedding_store,))
            writer.add_module(module_name, spec, [tensor])
            nbytes = spec.nbytes
        else:
            writer.add_tensor(name, tensor)
        checkpoint.release(name)
        report.total_dense_parameters += count
        report.total_parameters += count
        report.total_dense_bytes += count * DENSE_REFERENCE_BYTES
        report.total_bytes += nbytes


def _embedding_names(model: Any) -> set[str]:
    """Names of the token embedding and of the head, those of the two that there are."""
    wanted = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    return {name for name, module in model.named_modules() if id(module) in wanted}


def _hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of every weight file of the source, by name."""
    files = sorted({info.file for info in checkpoint.tensors().values()})
    return {file.name: sha256_of(file) for file in files}
