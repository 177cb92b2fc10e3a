"""Opens a checkpoint directory, slim or plain dense: everything that can be checked without reading the weights is
checked in `Checkpoint.open`, and tensors are handed out as views of the mapped files."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from cai_runtime.errors import (
    CheckpointError,
    CorruptFileError,
    InvalidConfigError,
    KeepError,
    MissingFileError,
    NonFiniteTensorError,
    TensorDtypeError,
    TensorMissingError,
    TensorShapeError,
)
from cai_runtime.progress import progress_bar
from cai_runtime.slim.check import check_modules
from cai_runtime.slim.config import SlimConfig
from cai_runtime.slim.elastic import ElasticTable, checked_keep
from cai_runtime.slim.files import check_text_files, read_json
from cai_runtime.slim.shard import DTYPES, MappedFile, TensorInfo, read_header
from cai_runtime.slim.spec import FLOAT_STORE_OF_DTYPE, STORES, ModuleSpec

if TYPE_CHECKING:
    import torch

    from cai_runtime.slim.module import ModuleWeights

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
REPORT_FILE = "slim_report.json"


class _Part(NamedTuple):
    """Which of a core's tensors one is."""

    suffix: str  # see `StoreType.tensors`
    store: str
    core_shape: tuple[int, ...]


class Checkpoint:
    """An open checkpoint directory. Use as a context manager, or `close` it.

    Attributes:
        path: the directory.
        config: config.json, parsed.
        modules: the modules that `quantization_config` lists, by full name; empty for a plain dense checkpoint.
        is_slim: whether there is a slim `quantization_config`.
        nbytes: bytes of all tensors.
        elastic: the table of an elastic checkpoint, otherwise None.
        keep: of an elastic checkpoint: the share of its table's parameters that is in use, at most what was asked for.

    An elastic checkpoint that is opened at some `keep` looks like the smaller checkpoint that it holds: `modules`,
    `tensors`, `nbytes` and everything that is read are that one's, and so is `config`, which is no longer elastic. Only
    `TensorInfo.start` and `.file` tell where the larger tensor lies. Opened without, it is at its largest keep, and
    `config` is as it is on disk.

    Reading from several threads is fine. The files must not be changed while they are open.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        slim: SlimConfig | None,
        tensors: dict[str, TensorInfo],
        keep: float | None = None,
    ):
        self.path = path
        self.config = config
        self.is_slim = slim is not None
        self.format_version = slim.format_version if slim is not None else None
        self.modules: dict[str, ModuleSpec] = slim.modules if slim is not None else {}
        self.elastic = slim.elastic if slim is not None else None
        self.keep: float | None = None
        self._closed = False
        # As `quantization_config` lists them, each with the second form of an elastic module that has two.
        seconds = {m.name: m.second for m in self.elastic.modules if m.second} if self.elastic is not None else {}
        self._forms = {
            name: [spec, seconds[name]] if name in seconds else [spec] for name, spec in self.modules.items()
        }
        self._on_disk = tensors
        self._tensors = tensors  # those in use, in the shape in use
        self._maps = {file: MappedFile(file) for file in {info.file for info in tensors.values()}}
        if self.elastic is not None:
            self._take(self.elastic, keep)
        elif keep is not None:
            raise KeepError(
                f"keep {checked_keep(keep):g} was asked for, but the checkpoint is not elastic: it has one size. Open it "
                "without keep, or make an elastic one (cai compress --elastic)",
                file=path,
            )
        self.nbytes = sum(info.nbytes for info in self._tensors.values())

    @classmethod
    def open(cls, path: str | Path, keep: float | None = None) -> Checkpoint:
        """Open and check a directory. No weight is read; the pivots of interpolative modules are.

        keep: of an elastic checkpoint: the share of parameters to use, at most, in the range that its table spans; None: the
        largest.

        Raises:
            KeepError: the checkpoint is not elastic, or does not go as low or as high. TypeError: `keep` is no number.
            MissingFileError: the directory, config.json, or a shard is not there.
            InvalidConfigError: config.json or the index is malformed, or contradicts itself or the files.
            UnknownVersionError, UnknownKindError, UnknownStoreError: written by a version this one does not know.
            TruncatedFileError, CorruptFileError: a shard is cut short, or its header contradicts itself; a file is a Git
                LFS pointer.
            TensorMissingError, TensorShapeError, TensorDtypeError: a tensor is not what its module's entry implies.
            InvalidPivotError: a pivot is not a permutation.
        """
        path = Path(path).absolute()  # files are mapped when they are first read
        if not path.is_dir():
            raise MissingFileError("no such checkpoint directory", file=path)
        config = read_json(path / CONFIG_FILE)
        slim = SlimConfig.from_config(config, path / CONFIG_FILE)
        checkpoint = cls(path, config, slim, _read_tensors(path), keep)
        try:
            check_text_files(path)
            check_modules(path, checkpoint._forms, checkpoint._on_disk)
        except BaseException:
            checkpoint.close()
            raise
        return checkpoint

    def tensors(self) -> dict[str, TensorInfo]:
        """The place of every tensor in use, by name. The other forms of an elastic checkpoint's modules are not in use."""
        return dict(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def has_module(self, name: str) -> bool:
        """Whether the checkpoint holds linear module `name`. False for a tied head, which has no tensor of its own."""
        return name in self.modules or f"{name}.weight" in self._tensors

    def spec(self, name: str) -> ModuleSpec:
        """The module's spec: its entry, or what its `weight` implies when it has none (kind dense).

        Raises:
            TensorMissingError, TensorShapeError, TensorDtypeError: no entry and no 2-D fp32, bf16 or fp16
                `name`.weight.
        """
        if name in self.modules:
            return self.modules[name]
        info = self._info(f"{name}.weight")
        if len(info.shape) != 2 or 0 in info.shape:
            raise TensorShapeError(
                f"a linear module's weight must be [out, in], is {list(info.shape)}", file=info.file, tensor=info.name
            )
        store = FLOAT_STORE_OF_DTYPE.get(info.dtype)
        if store is None:
            raise TensorDtypeError(
                f"a dense weight must be {', '.join(FLOAT_STORE_OF_DTYPE)}, is {info.dtype}",
                file=info.file,
                tensor=info.name,
            )
        return ModuleSpec("dense", info.shape[0], info.shape[1], None, (store,))

    def tensor(self, name: str, check_finite: bool = True) -> torch.Tensor:
        """The tensor as a view of the mapped file (do not write to it); a copy, where an elastic checkpoint's core is read
        in part. It stays valid after `release` and `close`.

        Raises:
            TensorMissingError: no such tensor.
            NonFiniteTensorError: it holds NaN or infinity (`check_finite`, which reads all of it once).
        """
        return self._read(self._info(name), check_finite)

    def module(self, name: str, check_finite: bool = True) -> ModuleWeights:
        """All tensors of one linear module, as views of the mapped files.

        check_finite: read every value once: no NaN, no infinity, and what `damage` knows of.

        Raises:
            CorruptFileError: a scale is not positive, a zero point above 15, an unused half byte not zero.
            Besides, what `tensor` and `spec` raise.
        """
        from cai_runtime.slim.module import ModuleWeights
        from cai_runtime.slim.stores import CoreData

        spec = self.spec(name)
        cores = []
        for core, shape, store in zip(spec.core_names, spec.core_shapes, spec.store, strict=True):
            parts = {
                suffix: self._read(self._info(f"{name}.{core}{suffix}"), check_finite, _Part(suffix, store, shape))
                for suffix in STORES[store].tensors(shape)
            }
            cores.append(CoreData(parts[""], parts.get("_scale"), store, parts.get("_zero"), shape))
        pivot = self.tensor(f"{name}.pivot") if spec.has_pivot else None
        bias = self.tensor(f"{name}.bias", check_finite) if f"{name}.bias" in self._tensors else None
        return ModuleWeights(name, spec, cores, pivot, bias)

    def module_tensors(self, name: str) -> list[str]:
        """Names of all tensors of a module, its bias among them if it has one: what to `release` after copying it."""
        bias = f"{name}.bias"
        return [*self.spec(name).tensors(name), *([bias] if bias in self._tensors else [])]

    def release(self, names: str | Iterable[str]) -> None:
        """Drop the resident pages of these tensors: a loader that copies a tensor and releases it holds one copy."""
        for name in [names] if isinstance(names, str) else names:
            self._info(name)
            info = self._on_disk[name]
            self._maps[info.file].release(info.start, info.nbytes)

    def verify(self, progress: bool | None = None) -> None:
        """Read everything once, in use or not: no NaN, no infinity, every scale positive, zero points and unused half bytes
        as they must be. Raises for the first tensor that fails.

        progress: show a bar (None: only when stderr is a terminal).
        """
        parts = {
            f"{name}.{core}{suffix}": _Part(suffix, store, shape)
            for name, specs in self._forms.items()
            for spec in specs
            for core, shape, store in zip(spec.core_names, spec.core_shapes, spec.store, strict=True)
            for suffix in STORES[store].tensors(shape)
        }
        ordered = sorted(self._on_disk.values(), key=lambda info: (info.file, info.start))
        total = sum(info.nbytes for info in ordered)
        with progress_bar("verify", total=total, unit="B", show=progress, unit_scale=True) as bar:
            for info in ordered:
                self._read(info, True, parts.get(info.name))
                self._maps[info.file].release(info.start, info.nbytes)
                bar.update(info.nbytes)

    def report(self) -> dict[str, Any] | None:
        """`slim_report.json`, or None when there is none."""
        file = self.path / REPORT_FILE
        return read_json(file) if file.exists() else None

    def close(self) -> None:
        """Unmap the files. Idempotent. Memory of a file goes with the last tensor that still looks at it."""
        self._closed = True
        for mapped in self._maps.values():
            mapped.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        info = self._tensors.get(name)
        if info is None:
            raise TensorMissingError("the checkpoint has no such tensor", file=self.path, tensor=name)
        return info

    def _read(self, info: TensorInfo, check: bool, part: _Part | None = None) -> torch.Tensor:
        """A tensor in the shape of `info`. Its values are checked for what it is part of, too."""
        from cai_runtime.slim.stores import all_finite, damage

        if self._closed:
            raise CheckpointError("the checkpoint was closed", file=self.path, tensor=info.name)
        tensor = self._maps[info.file].corner(self._on_disk[info.name], info.shape)
        if check and not all_finite(tensor):
            raise NonFiniteTensorError(
                "holds NaN or infinity; the file is damaged or badly made", file=info.file, tensor=info.name
            )
        problem = damage(part.suffix, tensor, part.store, part.core_shape) if check and part is not None else None
        if problem is not None:
            raise CorruptFileError(problem, file=info.file, tensor=info.name)
        return tensor

    def _take(self, elastic: ElasticTable, keep: float | None) -> None:
        """From now on, let `modules`, `tensors` and all reads be those of the checkpoint's size at this keep."""
        try:
            view = elastic.at(self.modules, keep)
        except KeepError as e:
            raise KeepError(str(e), file=self.path) from None
        self.keep, self.modules = view.keep, {**self.modules, **view.modules}
        unused = {tensor for name in view.modules for spec in self._forms[name] for tensor in spec.tensors(name)}
        used = {tensor: size for name, spec in view.modules.items() for tensor, size in spec.tensors(name).items()}
        self._tensors = {name: info for name, info in self._on_disk.items() if name not in unused}
        for name, (dtype, shape) in used.items():
            if name in self._on_disk:  # what is missing is found and named when all modules are checked
                nbytes = math.prod(shape) * DTYPES[dtype][1]
                self._tensors[name] = replace(self._on_disk[name], shape=shape, nbytes=nbytes)
        if keep is not None:
            self.config = {**self.config, "quantization_config": SlimConfig(self.modules).to_json()}


def _read_tensors(path: Path) -> dict[str, TensorInfo]:
    """Headers of all shards. model.safetensors goes before an index (as in transformers) that does not name it."""
    index_file = path / INDEX_FILE
    weight_map = _read_index(index_file) if index_file.exists() else {}
    if (path / SINGLE_FILE).exists() and SINGLE_FILE not in weight_map.values():
        weight_map = {}
        shards = [path / SINGLE_FILE]
    elif index_file.exists():
        shards = [path / name for name in sorted(set(weight_map.values()))]
    else:
        shards = sorted(path.glob("*.safetensors"))
    if not shards:
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth"))
        hint = "; pickled weights (.bin, .pt) are never read, convert them to safetensors" if pickled else ""
        raise MissingFileError(f"the directory holds no safetensors weights{hint}", file=path)
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in read_header(shard).items():
            if name in tensors:
                raise InvalidConfigError(f"the tensor is also in {tensors[name].file.name}", file=shard, tensor=name)
            tensors[name] = info
    # As in transformers the shards decide. An index may list a tensor that none of them has: buffers that old writers
    # left out (rotary_emb.inv_freq). One that the model needs is found missing when it is read.
    return tensors


def _read_index(file: Path) -> dict[str, str]:
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidConfigError("needs 'weight_map', an object from tensor to file", file=file)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or Path(shard).name != shard:
            raise InvalidConfigError(
                f"weight_map must name safetensors files of this directory, not {shard!r}", file=file, tensor=name
            )
    return weight_map
