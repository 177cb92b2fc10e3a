"""Writes a checkpoint directory, slim or dense. It appears under its name when it is complete, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from cai_runtime.errors import (
    CheckpointError,
    CheckpointWriteError,
    InvalidConfigError,
    InvalidPivotError,
    KeepError,
    NonFiniteTensorError,
    TensorDtypeError,
    TensorShapeError,
)
from cai_runtime.slim.config import SlimConfig
from cai_runtime.slim.destination import PartialDirectory, check_destination, destination
from cai_runtime.slim.publish import publish
from cai_runtime.slim.reader import CONFIG_FILE, INDEX_FILE, REPORT_FILE, SINGLE_FILE, Checkpoint, read_json
from cai_runtime.slim.shard import DTYPE_NAMES
from cai_runtime.slim.spec import FLOAT_STORE_OF_DTYPE, ModuleSpec
from cai_runtime.slim.stores import CoreData, all_finite, damage, quantize

if TYPE_CHECKING:
    import torch

    from cai_runtime.slim.elastic import ElasticTable

T = TypeVar("T")

# Copied from `source_dir` as they are. Names, not patterns: never weights, never code.
COPIED_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "normalizer.json", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md",
)  # fmt: skip
# How a model makes embeddings: see `embedding_files`. The folders of modules.json come along, too.
EMBEDDING_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")

# transformers skips a quantization method that it does not know, with a warning, and would go on with weights drawn at
# random. It does look for its weights where config.json's `transformers_weights` says: there is no such file, so it stops,
# naming it. cai_runtime.integrations takes the entry away once it is imported.
GUARD_KEY = "transformers_weights"
GUARD = "import-cai_runtime-to-load-this-slim-checkpoint.safetensors"

DEFAULT_SHARD_BYTES = 1 << 30
ALIGNMENT = 64  # bytes; a cache line, and the widest vector load


class CheckpointWriter:
    """Collects modules and tensors, then publishes a directory. Use as a context manager and call `finish` at the end:

        with CheckpointWriter(dst, config=config, source_dir=src) as writer:
            writer.add_module(name, spec, cores, pivot=pivot)
            writer.add_tensor("model.norm.weight", norm)
            writer.finish({"keep": 0.8})

    Everything is written to a hidden directory beside `dst`, which takes `dst`'s name in `finish` and is removed on
    any error. At most one shard is held in memory.

    Args:
        dst: the directory to make. Its parents are made when missing.
        config: config.json. `quantization_config` is replaced by that of the added modules, or dropped when there
            are none; so is the entry that keeps transformers from loading a slim checkpoint as a dense one (`GUARD`).
        source_dir: where tokenizer, chat template, generation settings and licence are copied from (`COPIED_FILES`).
        max_shard_bytes: a shard is written before it would exceed this; a larger tensor has a shard of its own.
        overwrite: replace an existing checkpoint, once the new one is complete. Otherwise a directory that isn't empty is
            an error.

    Raises (all methods):
        CheckpointWriteError: `dst` is taken or is the source, the disk is full, or the system refused.
        InvalidConfigError, TensorShapeError, TensorDtypeError, InvalidPivotError, NonFiniteTensorError: what was
            added is not what its spec says, a name occurs twice, or a value can't be stored.
    """

    def __init__(
        self,
        dst: str | Path,
        *,
        config: dict[str, Any],
        source_dir: str | Path | None = None,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        overwrite: bool = False,
    ):
        if max_shard_bytes < 1:
            raise CheckpointWriteError(f"max_shard_bytes must be positive, is {max_shard_bytes}")
        self._dst = destination(dst)
        self._config = dict(config)
        self._source = Path(source_dir) if source_dir is not None else None
        self._max_shard_bytes = max_shard_bytes
        self._overwrite = overwrite
        self._modules: dict[str, ModuleSpec] = {}
        self._elastic: ElasticTable | None = None
        self._placed: dict[str, int] = {}  # tensor -> number of its shard
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shards: list[Path] = []
        self._open = False
        self._guard(self._refuse_taken)
        self._partial = self._guard(lambda: PartialDirectory(self._dst))
        self._tmp = self._partial.path
        self._open = True

    def add_module(
        self,
        name: str,
        spec: ModuleSpec,
        cores: Sequence[torch.Tensor | CoreData],
        pivot: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        """Add one linear module and list it in `quantization_config`.

        cores: one per core of `spec`, in its shape (`core_shapes`); floats are packed as the spec's store says
            (`quantize`), a `CoreData` (already packed, from another checkpoint or a finer rounding) is stored as it is.
        pivot: an integer permutation of the outputs, [out]; interpolative only.
        bias: fp32, bf16 or fp16, [out], stored as it is.
        """
        import torch

        if name in self._modules:
            raise InvalidConfigError("the module was already added", tensor=name)
        tensors = _core_tensors(name, spec, cores)
        if spec.has_pivot != (pivot is not None):
            raise InvalidPivotError(f"kind {spec.kind} {'needs a' if spec.has_pivot else 'has no'} pivot", tensor=name)
        if pivot is not None:
            ordered = pivot.detach().cpu().long()
            if tuple(ordered.shape) != (spec.out_features,) or not torch.equal(
                ordered.sort().values, torch.arange(spec.out_features, dtype=torch.int64, device="cpu")
            ):
                raise InvalidPivotError(f"must be a permutation of 0..{spec.out_features - 1}", tensor=f"{name}.pivot")
            tensors[f"{name}.pivot"] = ordered.to(torch.int32)
        if bias is not None:
            if tuple(bias.shape) != (spec.out_features,):
                raise TensorShapeError(
                    f"a bias must be [{spec.out_features}], is {list(bias.shape)}", tensor=f"{name}.bias"
                )
            if _dtype_name(bias) not in FLOAT_STORE_OF_DTYPE:
                raise TensorDtypeError(f"a bias must be fp32, bf16 or fp16, is {bias.dtype}", tensor=f"{name}.bias")
            tensors[f"{name}.bias"] = bias
        self._add(tensors)
        self._modules[name] = spec

    def add_second_form(self, name: str, spec: ModuleSpec, cores: Sequence[torch.Tensor | CoreData]) -> None:
        """Add the lowrank form of a module that was added as dense, for the keeps of an elastic checkpoint at which it is
        lowrank. The table must list it. cores: as in `add_module`."""
        listed = self._modules.get(name)
        if spec.kind != "lowrank" or listed is None or listed.kind != "dense":
            raise InvalidConfigError("only a module added as dense has a second form, and that is lowrank", tensor=name)
        self._add(_core_tensors(name, spec, cores))

    def set_elastic(self, table: ElasticTable) -> None:
        """Make the checkpoint elastic. Call it when the modules of the table were added."""
        table.check(self._modules)
        self._elastic = table

    def add_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor as it is: embeddings, norms, the weights of modules that stay dense and unlisted."""
        self._add({name: tensor})

    def finish(self, report: dict[str, Any] | None = None) -> Path:
        """Write what is left, check that the result opens, and publish it. Returns `dst`.

        report: written as slim_report.json; None writes none.
        """
        self._require_open()
        try:
            self._flush()
            if not self._shards:
                raise CheckpointWriteError("nothing was added", file=self._dst)
            self._guard(self._name_shards)
            config = {k: v for k, v in self._config.items() if k not in ("quantization_config", GUARD_KEY)}
            if self._modules:
                config[GUARD_KEY] = GUARD
                config["quantization_config"] = SlimConfig(self._modules, elastic=self._elastic).to_json()
            self._write_json(CONFIG_FILE, config)
            if report is not None:
                self._write_json(REPORT_FILE, report)
            if self._source is not None:
                self._guard(self._copy_files)
            Checkpoint.open(self._tmp).close()
            self._guard(self._refuse_taken)
            self._guard(lambda: publish(self._tmp, self._dst))
        finally:
            self.abort()  # after a success there is nothing left to remove
        return self._dst

    def abort(self) -> None:
        """Remove everything written so far. Idempotent; nothing happens after `finish`."""
        self._pending.clear()
        if self._open:
            self._open = False
            self._partial.remove()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _require_open(self) -> None:
        if not self._open:
            raise CheckpointWriteError("this writer was already finished or aborted", file=self._dst)

    def _refuse_taken(self) -> None:
        check_destination(self._dst, source=self._source, overwrite=self._overwrite)

    def _guard(self, act: Callable[[], T]) -> T:
        """Run something that touches the disk; a refusal of the system is a typed error and leaves nothing behind."""
        try:
            return act()
        except OSError as e:
            self.abort()
            file = Path(e.filename).name if e.filename else ""
            raise CheckpointWriteError(f"can't be written: {e.strerror or e} {file}".rstrip(), file=self._dst) from e

    def _add(self, tensors: dict[str, torch.Tensor]) -> None:
        self._require_open()
        for name, tensor in tensors.items():
            if not name or name == "__metadata__":
                raise InvalidConfigError(f"{name!r} can't be a tensor's name")
            if name in self._placed or name in self._pending:
                raise InvalidConfigError("the tensor was already added", tensor=name)
            if _dtype_name(tensor) is None:
                raise TensorDtypeError(f"safetensors has no {tensor.dtype}", tensor=name)
            if not all_finite(tensor):
                raise NonFiniteTensorError("holds NaN or infinity", tensor=name)
        for name, tensor in tensors.items():
            if self._pending and self._pending_bytes + tensor.nbytes > self._max_shard_bytes:
                self._flush()
            # A copy: the caller may change, release or free its own before the shard is written.
            self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
            self._pending_bytes += tensor.nbytes

    def _flush(self) -> None:
        if self._pending:
            self._guard(self._write_shard)

    def _write_shard(self) -> None:
        import torch

        # The format allows no padding between tensors. Those whose size is a multiple of the alignment go first, so
        # that each starts aligned; the rest by falling element size, so that each starts at a multiple of its own.
        ordered = sorted(
            self._pending.items(),
            key=lambda item: -item[1].dtype.itemsize if item[1].nbytes % ALIGNMENT else -ALIGNMENT,
        )
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for this entry
        offset = 0
        for name, tensor in ordered:
            end = offset + tensor.nbytes
            header[name] = {"dtype": _dtype_name(tensor), "shape": list(tensor.shape), "data_offsets": [offset, end]}
            offset = end
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-(8 + len(raw)) % ALIGNMENT)  # the data starts aligned; trailing spaces are allowed
        number = len(self._shards)
        shard = self._tmp / f"shard-{number}.safetensors"
        with shard.open("wb") as f:
            f.write(len(raw).to_bytes(8, "little") + raw)
            for _, tensor in ordered:
                if tensor.nbytes:
                    f.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            f.flush()
            os.fsync(f.fileno())
        self._shards.append(shard)
        self._placed.update(dict.fromkeys(self._pending, number))
        self._total_bytes += offset
        self._pending = {}
        self._pending_bytes = 0

    def _name_shards(self) -> None:
        """Hugging Face's names: model.safetensors alone, or model-00001-of-0000n.safetensors and an index."""
        count = len(self._shards)
        if count == 1:
            self._shards[0].rename(self._tmp / SINGLE_FILE)
            return
        names = [f"model-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]
        for shard, name in zip(self._shards, names, strict=True):
            shard.rename(self._tmp / name)
        weight_map = {tensor: names[number] for tensor, number in sorted(self._placed.items())}
        self._write_json(INDEX_FILE, {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map})

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        try:
            text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        except (TypeError, ValueError) as e:
            raise InvalidConfigError(f"can't be written as JSON: {e}", file=self._dst / name) from None

        def write() -> None:
            with (self._tmp / name).open("w", encoding="utf-8") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())

        self._guard(write)

    def _copy_files(self) -> None:
        assert self._source is not None
        templates = sorted((self._source / "additional_chat_templates").glob("*.jinja"))
        steps = sorted(self._source.glob("[0-9]_*/config.json"))  # of sentence-transformers, such as 1_Pooling
        for file in [*(self._source / name for name in COPIED_FILES + EMBEDDING_FILES), *templates, *steps]:
            if file.is_file():
                target = self._tmp / file.relative_to(self._source)
                target.parent.mkdir(exist_ok=True)
                with file.open("rb") as source, target.open("wb") as copy:  # the content of a link, not the link
                    shutil.copyfileobj(source, copy)
                    copy.flush()
                    os.fsync(copy.fileno())


def _dtype_name(tensor: torch.Tensor) -> str | None:
    return DTYPE_NAMES.get(str(tensor.dtype).removeprefix("torch."))


def _core_tensors(name: str, spec: ModuleSpec, cores: Sequence[torch.Tensor | CoreData]) -> dict[str, torch.Tensor]:
    """Every tensor of a module's cores by full name, checked against its spec."""
    if len(cores) != len(spec.store):
        raise InvalidConfigError(f"kind {spec.kind} has {len(spec.store)} cores, {len(cores)} were given", tensor=name)
    tensors: dict[str, torch.Tensor] = {}
    for core, label, shape, store in zip(cores, spec.core_names, spec.core_shapes, spec.store, strict=True):
        tensor = f"{name}.{label}"
        if tuple(core.shape) != shape:
            raise TensorShapeError(
                f"kind {spec.kind}, rank {spec.rank}, needs {list(shape)}, is {list(core.shape)}", tensor=tensor
            )
        for suffix, part in _packed(core, store, tensor).tensors.items():
            tensors[tensor + suffix] = part
    return tensors


def _packed(core: torch.Tensor | CoreData, store: str, name: str) -> CoreData:
    """The core as it is stored; errors name the tensor."""
    if not isinstance(core, CoreData):
        try:
            return quantize(core, store)
        except CheckpointError as e:
            raise type(e)(str(e), tensor=name) from None
    if core.store != store:
        raise TensorDtypeError(f"is packed as {core.store}, the spec says {store}", tensor=name)
    core.check_layout(name)
    for suffix, tensor in core.tensors.items():
        problem = damage(suffix, tensor, store, core.shape)
        if problem is not None:
            raise InvalidConfigError(problem, tensor=name + suffix)
    return core


def record_quality(path: str | Path, quality: Sequence[Mapping[str, float]]) -> None:
    """Write into an elastic checkpoint what was measured of it: `ElasticTable.quality`. config.json is replaced in one step.

    Raises:
        KeepError: the checkpoint is not elastic.
        InvalidConfigError: an entry has no 'keep' in (0, 1], or something that is no number.
        CheckpointWriteError: the system refused.
    """
    file = Path(path) / CONFIG_FILE
    config = read_json(file)
    slim = SlimConfig.from_config(config, file)
    if slim is None or slim.elastic is None:
        raise KeepError("the checkpoint is not elastic: it has one size, and no keeps to tell apart", file=path)
    entries = sorted((dict(entry) for entry in quality), key=lambda entry: entry.get("keep", 0))
    table = replace(slim.elastic, quality=tuple(entries))
    table.check(slim.modules)
    config["quantization_config"] = replace(slim, elastic=table).to_json()
    _replace_json(file, config)


def replace_report(path: str | Path, report: dict[str, Any]) -> None:
    """Replace the slim_report.json of a finished checkpoint, in one step. Raises CheckpointWriteError when the system
    refuses."""
    _replace_json(Path(path) / REPORT_FILE, report)


def _replace_json(file: Path, value: dict[str, Any]) -> None:
    tmp = file.with_name(f".{file.name}.partial")  # always the same: one that a killed process left is written over
    try:
        with tmp.open("w", encoding="utf-8") as f:
            f.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
            f.flush()
            os.fsync(f.fileno())
        tmp.replace(file)
    except OSError as e:
        tmp.unlink(missing_ok=True)
        raise CheckpointWriteError(f"can't be written: {e.strerror or e}", file=file) from e
