"""Estimates a compression before it starts: layers, sizes, disk, memory and time."""

from __future__ import annotations

import importlib.metadata
import math
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from cai_runtime.compressor.data.speech import require_audio
from cai_runtime.compressor.elastic.growth import check_smallest
from cai_runtime.compressor.factor.allocate import Curve, allocate
from cai_runtime.compressor.factor.choice import Choice
from cai_runtime.compressor.factor.choices import choose
from cai_runtime.compressor.factor.curves import TYPICAL_SHARE
from cai_runtime.compressor.factor.embedding_head import Ends
from cai_runtime.compressor.factor.mpo import reshapes
from cai_runtime.compressor.factor.plan_file import planned
from cai_runtime.compressor.options import BATCH, Options
from cai_runtime.compressor.stats.block_stack import all_there, find_stacks
from cai_runtime.compressor.stats.source_check import require_whole
from cai_runtime.compressor.stats.targets import find_targets
from cai_runtime.compressor.stats.uncompressed import Left
from cai_runtime.compressor.stats.weights import DenseWeights
from cai_runtime.compressor.train.heal import WINDOWS
from cai_runtime.errors import CompressionError
from cai_runtime.slim.spec import DENSE_REFERENCE_BYTES, STORES, ModuleSpec
from cai_runtime.stock.load import DTYPES

MOMENT_BYTES = 4 << 30  # limit of all moments on disk; above it, moments are computed twice instead
STUDENT_BYTES = 16  # bytes per trained parameter while healing: latent, rounded, gradient and momentum in fp32
HEAL = {False: 6.0, True: 4.0}  # fp32-equivalent FLOPs per parameter and token, by `Options.mixed`
OPTIMIZE = 5.0  # FLOPs of an optimizer step per out * in * min(out, in) of a layer, at keep 1
SHIFT_PASSES = 4  # forward passes of a block with `shift`, one per input group: q/k/v, o, gate/up, down


@dataclass(frozen=True)
class Plan:
    """Sizes and cost of one compression.

    Attributes:
        parameters: of the whole model. layer_parameters: of the compressed linear layers. embedding_parameters: of
            embedding and head. block_parameters: of the largest block.
        output_bytes: of the slim checkpoint. An upper bound under a budget in parameters; for an elastic checkpoint with
            both forms of every layer that is dense at the largest keep.
        layer_budget_bytes: under a budget in bytes, the bytes for the layers, and for the ends where their stores compete.
        moment_bytes: of all moments in fp32. state_bytes: of hidden states and gradients on disk. work_bytes: of the work
            directory. memory_bytes, heal_memory_bytes: peak memory before and while healing.
        whole: whether the whole model must be in memory, because transformers fuses tensors while loading.
        flops: floating point operations by stage.
        left: matrices that are not compressed. dst: the destination.
        choices: from a plan file, by layer; None without one.
    """

    model_type: str
    blocks: int
    layers: int
    parameters: int
    layer_parameters: int
    embedding_parameters: int
    block_parameters: int
    output_bytes: int
    layer_budget_bytes: int | None
    moment_bytes: int
    state_bytes: int
    work_bytes: int
    memory_bytes: int
    heal_memory_bytes: int
    whole: bool
    flops: dict[str, float]
    left: Left
    dst: Path
    choices: dict[str, Choice] | None = None

    def require_room(self, held: int = 0) -> None:
        """Raises CompressionError when disk or memory do not suffice. held: bytes already in the work directory."""
        parent = next(p for p in self.dst.absolute().parents if p.exists())
        work = max(self.work_bytes - held, 0)
        free, need = shutil.disk_usage(parent).free, work + self.output_bytes
        if free < need:
            raise CompressionError(
                f"{parent} has {free >> 20} MiB free, the compression needs up to {need >> 20} MiB: "
                f"{work >> 20} while it works and {self.output_bytes >> 20} for the checkpoint; free some space, or choose "
                "another destination"
            )
        available = available_memory()
        if available is not None and self.whole and self.memory_bytes > available:
            raise CompressionError(
                f"{self.model_type} needs about {self.memory_bytes >> 20} MiB of memory, {available >> 20} MiB are free:"
                " transformers fuses its tensors while it loads, so that all of it must be there at once. A narrower dtype "
                "takes less"
            )
        if available is not None and self.heal_memory_bytes > available:
            raise CompressionError(
                f"healing needs about {self.heal_memory_bytes >> 20} MiB of memory, {available >> 20} MiB are available: "
                "leave it out (--heal-tokens 0)"
            )

    def seconds(self, rate: float) -> dict[str, float]:
        """Estimated seconds by stage at `rate` FLOP/s."""
        return {stage: flops / rate for stage, flops in self.flops.items()}

    def to_json(self) -> dict[str, Any]:
        apart = ("dst", "choices", "left")
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in apart}
        return {**found, "left": self.left.parameters}

    def summary(self, rate: float | None = None) -> str:
        """A few lines of text. rate: measured FLOP/s of this machine; None: no time estimate."""
        lines = [
            f"{self.model_type}: {self.parameters:,} parameters, {self.layers} linear layers with {self.layer_parameters:,} "
            f"of them in {self.blocks} blocks",
            *self.left.lines(),
            f"checkpoint        up to {_mib(self.output_bytes)}, "
            f"{self.output_bytes / (self.parameters * DENSE_REFERENCE_BYTES):.3f} of bf16",
            f"work directory    up to {_mib(self.work_bytes)}",
            f"memory            about {_mib(max(self.memory_bytes, self.heal_memory_bytes))}"
            + (
                " (healing)"
                if self.heal_memory_bytes > self.memory_bytes
                else " (all of the model: transformers fuses tensors while it loads)"
                if self.whole
                else ""
            ),
        ]
        if rate is not None:
            seconds = self.seconds(rate)
            stages = ", ".join(f"{stage} {_time(took)}" for stage, took in seconds.items())
            lines.append(
                f"time              about {_time(sum(seconds.values()))} at {rate / 1e9:.0f} GFLOP/s: {stages}; and the text"
            )
        return "\n".join(lines)


def make_plan(weights: DenseWeights, options: Options, dst: Path) -> Plan:
    """The plan of a compression of `weights` to `dst`. Reads no weights.

    Raises UnsupportedModelError when nothing can be compressed. CheckpointError when the tensors do not match the model.
    CompressionError when transformers can't build the model, or the budget leaves nothing for the linear layers.
    """
    model: Any = weights.skeleton(DTYPES[options.dtype])
    model.tie_weights()
    if weights.is_speech:
        require_audio(options.calibration)
    stacks = find_stacks(model)
    require_whole(weights, model)
    positions = getattr(model.config, "max_position_embeddings", None)
    if not weights.is_speech and positions is not None and options.sequence_length > positions:
        raise CompressionError(
            f"sequence_length {options.sequence_length} is longer than the {positions} positions that the model knows"
        )
    targets = find_targets(model, [stack.name for stack in stacks], weights)
    shapes = [(t.module.out_features, t.module.in_features) for t in targets.values()]
    layer_parameters = sum(out * inp for out, inp in shapes)
    ends = {f"{name}.weight" for name in Ends.of(model, weights).names}
    matrices = [weights.shape(name) for name in sorted(ends)]
    embedding = sum(math.prod(shape) for shape in matrices)
    total = weights.parameters()
    # Where their stores compete, the ends are part of the budget and count here at their smallest.
    end_stores = options.stores if options.embedding_store is None else (options.embedding_store,)
    ends_bytes = sum(
        min(ModuleSpec("dense", rows, columns, None, (store,)).nbytes for store in end_stores)
        for rows, columns in matrices
    )
    compressed = {f"{name}.weight" for name in targets}
    others = sum(weights.nbytes(name) for name in weights.names() if name not in compressed and name not in ends)
    rest_bytes = ends_bytes + others
    budget = choices = None
    if options.plan is not None:
        choices = planned(options.plan, dict(zip(targets, shapes, strict=True)))
        output = rest_bytes + sum(
            choices[name].spec(*shape).nbytes for name, shape in zip(targets, shapes, strict=True)
        )
    elif options.target_bytes is not None:
        wanted = options.target_bytes
        output = int(wanted * total * DENSE_REFERENCE_BYTES) if isinstance(wanted, float) else wanted
        budget = output - rest_bytes
        if budget <= 0:
            raise CompressionError(
                f"target_bytes {output:,} is too small: embedding, head and norms alone take {rest_bytes:,}"
            )
        budget += ends_bytes if options.embedding_store is None else 0
        # The choices depend on errors that are not known yet. Whether the smallest choices fit does not.
        curves = {name: _unknown(name, o, i, options.kind) for name, (o, i) in zip(targets, shapes, strict=True)}
        competing: dict[str, tuple[int, int]] = {}
        if options.embedding_store is None:
            competing = {name: (rows, width) for name, (rows, width) in zip(sorted(ends), matrices, strict=True)}
        silent: dict[str, dict[str, float]] = {name: {} for name in (*curves, *competing)}
        choose(curves, options, noise=silent, budget_bytes=budget, ends=competing)
    else:
        assert options.keep is not None
        # The ranks depend on errors that are not known yet. Whether the smallest ranks fit does not.
        unknown = [_unknown(name, o, i, options.kind) for name, (o, i) in zip(targets, shapes, strict=True)]
        most = int(options.keep * layer_parameters)
        if options.smallest_keep is not None:
            check_smallest(unknown, options.smallest_keep, multiple=options.rank_multiple, floor=options.floor)
            most *= 2  # a module may have a dense and a lowrank form, and the lowrank form costs less than dense
        else:
            allocate(
                unknown,
                options.keep,
                kind=options.kind,
                allocation="uniform",
                multiple=options.rank_multiple,
                floor=0.0,
            )
        output = rest_bytes + _stored_bytes(most, options.stores[0])
    width = model.get_input_embeddings().embedding_dim
    blocks = sum(len(stack) for stack in stacks)
    # Speech: an encoder reads whole windows. A decoder has fewer positions; it counts with as many.
    length = model.config.max_source_positions if weights.is_speech else options.sequence_length
    tokens = options.samples * length
    size = DTYPES[options.dtype].itemsize
    states = tokens * width * size * (blocks + len(stacks)) * (2 if options.curvature else 1)
    inputs = sum(
        {(name.rpartition(".")[0], inp): inp * inp for name, (_, inp) in zip(targets, shapes, strict=True)}.values()
    )
    moments = 4 * (inputs + (sum(out * out for out, _ in shapes) if options.curvature else 0))
    block_parameters = max(sum(p.numel() for p in block.parameters()) for stack in stacks for block in stack.blocks)
    # Decomposing a layer takes, in fp64, both Gram matrices and their roots, and about four matrices of its own shape.
    decomposing = max(16 * (i * i + o * o * options.curvature) + 32 * o * i for o, i in shapes)
    healing = options.heal_tokens > 0
    whole = not all_there(model, weights)
    resident = total if whole else embedding + 3 * block_parameters
    heal_memory = (2 * total * size + int(STUDENT_BYTES * layer_parameters)) if healing else 0
    # Cores in the work directory: fp32 latents, or for an elastic checkpoint all forms in their stores.
    kept = 4 * layer_parameters if healing or not options.elastic else 0
    kept += output - rest_bytes if options.elastic else 0
    return Plan(
        model_type=weights.model_type,
        blocks=blocks,
        layers=len(targets),
        parameters=total,
        layer_parameters=layer_parameters,
        embedding_parameters=embedding,
        block_parameters=block_parameters,
        output_bytes=output,
        layer_budget_bytes=budget,
        moment_bytes=moments,
        state_bytes=states,
        # Healing saves cores and momentum, and a new file exists beside the old one until it replaces it.
        work_bytes=states + min(moments, MOMENT_BYTES) + kept + (4 * kept if healing else 0),
        memory_bytes=resident * size + 2 * moments // max(blocks, 1) + decomposing + 4 * tokens * width * size,
        heal_memory_bytes=heal_memory,
        whole=whole,
        flops=_flops(options, shapes, layer_parameters, embedding, length, WINDOWS if weights.is_speech else BATCH),
        left=Left.of(model, weights, targets),
        dst=dst,
        choices=choices,
    )


def _unknown(name: str, out: int, inp: int, kind: str) -> Curve:
    """The curve of a layer whose errors are unknown: all 0."""
    reshape = reshapes(out, inp)[0] if kind == "mpo" else None
    return Curve(name, out, inp, [0.0] * ((min(out, inp) if reshape is None else reshape.widest) + 1), reshape=reshape)


def _flops(
    options: Options, shapes: list[tuple[int, int]], layers: int, head: int, length: int, step: int
) -> dict[str, float]:
    """FLOPs by stage. layers, head: parameters. length: positions per sequence. step: sequences per healing step."""
    tokens = options.samples * length
    forward = 2.0 * layers * tokens
    squares = sum(2.0 * tokens * (i * i + (o * o if options.curvature else 0)) / 2 for o, i in shapes)
    # Two Cholesky factorizations, three products, an eigendecomposition of the smaller side (about 9 n^3); fp64 costs twice.
    decompose = sum(2 * ((o**3 + i**3) / 3 + 6 * o * i * min(o, i) + 9 * min(o, i) ** 3) for o, i in shapes)
    optimizer_step = OPTIMIZE * (options.keep or TYPICAL_SHARE) * sum(o * i * min(o, i) for o, i in shapes)
    found = {
        "calibrate": forward * (4 if options.curvature else 2) + 6.0 * head * tokens + squares,
        "decompose": decompose,
        "blocks": 3 * decompose + forward * (SHIFT_PASSES + 2 if options.shift else 1) + squares * options.shift * 3,
        "heal": options.heal_steps * (step * length * HEAL[options.mixed] * (layers + head) + optimizer_step),
    }
    if options.embedding_store is None:
        found["calibrate"] += 2.0 * head * tokens * (1 + len(options.stores))
    refine_steps = options.refine_epochs * options.samples // BATCH
    found["blocks"] += options.refine_epochs * forward * 3 + refine_steps * optimizer_step
    return {stage: flops for stage, flops in found.items() if flops}


def measured_rate(seconds: float = 0.5) -> float:
    """Half the FLOP/s of an fp32 matrix product on the CPU, which is what the stages reach. seconds: time to measure."""
    a = torch.ones(BATCH * 512, 1024, dtype=torch.float32)  # not random: the global generator belongs to the caller
    b = torch.ones(1024, 1024, dtype=torch.float32)
    a @ b
    count, start = 0, perf_counter()
    while perf_counter() - start < seconds:
        a @ b
        count += 1
    return count * 2 * a.numel() * b.shape[1] / (perf_counter() - start) / 2


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping (MemAvailable); None where the system does not report them."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return None


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    return {name: importlib.metadata.version(name) for name in ("cai-runtime", "torch", "transformers")}


def _stored_bytes(parameters: int, store: str) -> int:
    """Upper bound of the bytes of `parameters` numbers in `store`, scales included."""
    kind = STORES[store]
    return int(parameters * (kind.bytes_per_number + (2.5 / kind.group if kind.group else 0))) + parameters // 256


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):,.0f} MiB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
