"""Opens a checkpoint directory, slim or plain dense. `Checkpoint.open` checks everything that can be checked without reading
the weights. Tensors are views of the mapped files."""

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
    """The role of a tensor in a core: its codes, scales or zero points."""

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
        keep: of an elastic checkpoint: the share of its table's parameters in use, at most the `keep` given to `open`.

    An elastic checkpoint opened at some `keep` looks like the ordinary checkpoint of that size: `config`, `modules`,
    `tensors`, `nbytes` and all reads. Only `TensorInfo.start` and `.file` say where the larger tensor lies. Opened without
    `keep`, the checkpoint has its largest size, and `config` is as on disk.

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
        # By module: the form that `quantization_config` lists, then the second form of an elastic module, if it has one.
        seconds = {m.name: m.second for m in self.elastic.modules if m.second} if self.elastic is not None else {}
        self._forms = {
            name: [spec, seconds[name]] if name in seconds else [spec] for name, spec in self.modules.items()
        }
        self._on_disk = tensors
        self._tensors = tensors  # those in use at this keep, with their shapes at this keep
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
        """Open and check a directory. Reads no weights, but the pivots of interpolative modules.

        keep: of an elastic checkpoint: the largest share of parameters to use, in the range of its table; None: the largest
        of the table.

        Raises:
            KeepError: the checkpoint is not elastic, or `keep` is outside its range. TypeError: `keep` is no number.
            MissingFileError: the directory, config.json, or a shard is missing.
            InvalidConfigError: config.json or the index is malformed, or contradicts itself or the files.
            UnknownVersionError, UnknownKindError, UnknownStoreError: the checkpoint is of a newer version.
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
        """The place of every tensor in use, by name. Forms that an elastic checkpoint's keep leaves out are not in use."""
        return dict(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def has_module(self, name: str) -> bool:
        """Whether the checkpoint holds linear module `name`. False for a tied head, which has no tensor of its own."""
        return name in self.modules or f"{name}.weight" in self._tensors

    def spec(self, name: str) -> ModuleSpec:
        """The module's spec: its entry in `modules`, or without one a dense spec from its `weight`.

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
        """The tensor as a view of the mapped file: do not write to it. If only part of an elastic checkpoint's core is read,
        a copy. It stays valid after `release` and `close`.

        Raises:
            TensorMissingError: no such tensor.
            NonFiniteTensorError: it holds NaN or infinity (`check_finite`, which reads all of it once).
        """
        return self._read(self._info(name), check_finite)

    def module(self, name: str, check_finite: bool = True) -> ModuleWeights:
        """All tensors of one linear module, as views of the mapped files.

        check_finite: read every value once, and check it for NaN, infinity and the faults that `damage` finds.

        Raises:
            CorruptFileError: a scale is not positive, a zero point above 15, an unused half byte not zero.
            What `tensor` and `spec` raise.
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
        """Names of all tensors of a module, its bias included: those to `release` after copying it."""
        bias = f"{name}.bias"
        return [*self.spec(name).tensors(name), *([bias] if bias in self._tensors else [])]

    def release(self, names: str | Iterable[str]) -> None:
        """Let the system drop the mapped pages of these tensors, so that a loader that copied them holds one copy."""
        for name in [names] if isinstance(names, str) else names:
            self._info(name)
            info = self._on_disk[name]
            self._maps[info.file].release(info.start, info.nbytes)

    def verify(self, progress: bool | None = None) -> None:
        """Read all tensors once, in use or not, and check them for NaN, infinity, and invalid scales, zero points and unused
        half bytes. Raises NonFiniteTensorError or CorruptFileError for the first that fails.

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
        """Close the files. Idempotent. A file stays mapped until the last tensor that views it is gone."""
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
        """A tensor in the shape of `info`. check: check its values; with `part`, also as codes, scales or zero points."""
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
        """Restrict `modules`, `tensors` and all reads to the checkpoint's size at this keep."""
        try:
            view = elastic.at(self.modules, keep)
        except KeepError as e:
            raise KeepError(str(e), file=self.path) from None
        self.keep, self.modules = view.keep, {**self.modules, **view.modules}
        unused = {tensor for name in view.modules for spec in self._forms[name] for tensor in spec.tensors(name)}
        used = {tensor: size for name, spec in view.modules.items() for tensor, size in spec.tensors(name).items()}
        self._tensors = {name: info for name, info in self._on_disk.items() if name not in unused}
        for name, (dtype, shape) in used.items():
            if name in self._on_disk:  # check_modules finds and names missing tensors later
                nbytes = math.prod(shape) * DTYPES[dtype][1]
                self._tensors[name] = replace(self._on_disk[name], shape=shape, nbytes=nbytes)
        if keep is not None:
            self.config = {**self.config, "quantization_config": SlimConfig(self.modules).to_json()}


def _read_tensors(path: Path) -> dict[str, TensorInfo]:
    """Headers of all shards. As in transformers, model.safetensors takes precedence over an index that does not name it."""
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
    # As in transformers, the shards decide. The index may list tensors that no shard has: old writers left out some buffers
    # (rotary_emb.inv_freq). If the model needs such a tensor, reading it raises TensorMissingError.
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
