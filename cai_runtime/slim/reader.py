"""Opens a checkpoint directory, slim or plain dense: everything that can be checked without reading the weights is
checked in `Checkpoint.open`, and tensors are handed out as views of the mapped files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from cai_runtime.errors import (
    CheckpointError,
    CorruptFileError,
    InvalidConfigError,
    InvalidPivotError,
    MissingFileError,
    NonFiniteTensorError,
    TensorDtypeError,
    TensorMissingError,
    TensorShapeError,
)
from cai_runtime.slim.shard import MappedFile, TensorInfo, read_header
from cai_runtime.slim.spec import FLOAT_STORE_OF_DTYPE, STORES, ModuleSpec, SlimConfig

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

    Reading from several threads is fine. The files must not be changed while they are open.
    """

    def __init__(self, path: Path, config: dict[str, Any], slim: SlimConfig | None, tensors: dict[str, TensorInfo]):
        self.path = path
        self.config = config
        self.is_slim = slim is not None
        self.format_version = slim.format_version if slim is not None else None
        self.modules: dict[str, ModuleSpec] = slim.modules if slim is not None else {}
        self._closed = False
        self._tensors = tensors
        self._maps = {file: MappedFile(file) for file in {info.file for info in tensors.values()}}
        self.nbytes = sum(info.nbytes for info in tensors.values())

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open and check a directory. No weight is read; the pivots of interpolative modules are.

        Raises:
            MissingFileError: the directory, config.json, or a shard is not there.
            InvalidConfigError: config.json or the index is malformed, or contradicts itself or the files.
            UnknownVersionError, UnknownKindError, UnknownStoreError: written by a version this one does not know.
            TruncatedFileError, CorruptFileError: a shard is cut short, or its header contradicts itself.
            TensorMissingError, TensorShapeError, TensorDtypeError: a tensor is not what its module's entry implies.
            InvalidPivotError: a pivot is not a permutation.
        """
        path = Path(path)
        if not path.is_dir():
            raise MissingFileError("no such checkpoint directory", file=path)
        config = read_json(path / CONFIG_FILE)
        slim = SlimConfig.from_config(config, path / CONFIG_FILE)
        checkpoint = cls(path, config, slim, _read_tensors(path))
        try:
            for name, spec in checkpoint.modules.items():
                checkpoint._check_module(name, spec)
            for name, spec in checkpoint.modules.items():
                if spec.has_pivot:
                    checkpoint._check_pivot(name, spec)
        except BaseException:
            checkpoint.close()
            raise
        return checkpoint

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor's place, by name."""
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
        """The tensor as a view of the mapped file (do not write to it). It stays valid after `release` and `close`.

        Raises:
            TensorMissingError: no such tensor.
            NonFiniteTensorError: it holds NaN or infinity (`check_finite`, which reads all of it once).
        """
        from cai_runtime.slim.stores import all_finite

        if self._closed:
            raise CheckpointError("the checkpoint was closed", file=self.path, tensor=name)
        info = self._info(name)
        tensor = self._maps[info.file].tensor(info)
        if check_finite and not all_finite(tensor):
            raise NonFiniteTensorError(
                "holds NaN or infinity; the file is damaged or badly made", file=info.file, tensor=name
            )
        return tensor

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
                suffix: self._stored(f"{name}.{core}{suffix}", check_finite, _Part(suffix, store, shape))
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
            info = self._info(name)
            self._maps[info.file].release(info.start, info.nbytes)

    def verify(self, progress: bool | None = None) -> None:
        """Read everything once: no NaN, no infinity, every scale positive, zero points and unused half bytes as they must
        be. Raises for the first tensor that fails.

        progress: show a bar (None: only when stderr is a terminal).
        """
        parts = {
            f"{name}.{core}{suffix}": _Part(suffix, store, shape)
            for name, spec in self.modules.items()
            for core, shape, store in zip(spec.core_names, spec.core_shapes, spec.store, strict=True)
            for suffix in STORES[store].tensors(shape)
        }
        ordered = sorted(self._tensors.values(), key=lambda info: (info.file, info.start))
        with _progress_bar(self.nbytes, "verify", progress) as update:
            for info in ordered:
                self._stored(info.name, True, parts.get(info.name))
                self.release(info.name)
                update(info.nbytes)

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

    def _stored(self, name: str, check: bool, part: _Part | None) -> torch.Tensor:
        """A tensor whose values are checked for what it is part of, too."""
        from cai_runtime.slim.stores import damage

        tensor = self.tensor(name, check)
        problem = damage(part.suffix, tensor, part.store, part.core_shape) if check and part is not None else None
        if problem is not None:
            raise CorruptFileError(problem, file=self._info(name).file, tensor=name)
        return tensor

    def _check_module(self, name: str, spec: ModuleSpec) -> None:
        wanted = spec.tensors(name)
        for tensor, (dtype, shape) in wanted.items():
            info = self._tensors.get(tensor)
            if info is None:
                raise TensorMissingError(f"module {name} of kind {spec.kind} needs it", file=self.path, tensor=tensor)
            if info.dtype != dtype:
                raise TensorDtypeError(
                    f"module {name} of kind {spec.kind}, store {list(spec.store)}, needs {dtype}, is {info.dtype}",
                    file=info.file,
                    tensor=tensor,
                )
            if info.shape != shape:
                raise TensorShapeError(
                    f"module {name} of kind {spec.kind}, rank {spec.rank}, needs {list(shape)}, is {list(info.shape)}",
                    file=info.file,
                    tensor=tensor,
                )
        bias = self._tensors.get(f"{name}.bias")
        if bias is not None and bias.dtype not in FLOAT_STORE_OF_DTYPE:
            raise TensorDtypeError(
                f"a bias must be {', '.join(FLOAT_STORE_OF_DTYPE)}, is {bias.dtype}", file=bias.file, tensor=bias.name
            )
        if bias is not None and bias.shape != (spec.out_features,):
            raise TensorShapeError(
                f"a bias must be [{spec.out_features}], is {list(bias.shape)}", file=bias.file, tensor=bias.name
            )
        # What no entry explains, a left-over dense weight say, would make it a guess which of the two is the module.
        cores = ["weight", *(f"core_{k}" for k in range(len(spec.store) + 1))]
        for suffix in ("pivot", *cores, *(core + beside for core in cores for beside in ("_scale", "_zero"))):
            extra = f"{name}.{suffix}"
            if extra in self._tensors and extra not in wanted:
                raise InvalidConfigError(
                    f"module {name} of kind {spec.kind}, store {list(spec.store)}, has no use for this tensor",
                    file=self._tensors[extra].file,
                    tensor=extra,
                )

    def _check_pivot(self, name: str, spec: ModuleSpec) -> None:
        import numpy as np

        info = self._info(f"{name}.pivot")
        try:
            pivot = np.fromfile(info.file, dtype="<i4", count=spec.out_features, offset=info.start)
        except OSError as e:
            raise MissingFileError(f"can't be read: {e.strerror or e}", file=info.file, tensor=info.name) from None
        if not np.array_equal(np.sort(pivot), np.arange(spec.out_features, dtype=np.int32)):
            raise InvalidPivotError(
                f"is not a permutation of 0..{spec.out_features - 1}; the file is damaged",
                file=info.file,
                tensor=info.name,
            )


@contextmanager
def _progress_bar(total: int, title: str, progress: bool | None) -> Iterator[Callable[[int], object]]:
    if not (sys.stderr.isatty() if progress is None else progress):
        yield lambda nbytes: None  # a bar that is merely disabled would still start tqdm's monitor thread
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc=title) as bar:
        yield bar.update


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        MissingFileError: it is not there or can't be read.
        InvalidConfigError: it is not a JSON object in UTF-8.
    """
    try:
        value = json.loads(file.read_bytes().decode("utf-8"))
    except OSError as e:
        raise MissingFileError(f"can't be read: {e.strerror or e}", file=file) from None
    except (ValueError, RecursionError) as e:
        raise InvalidConfigError(f"is not valid JSON: {e}", file=file) from None
    if not isinstance(value, dict):
        raise InvalidConfigError("must hold a JSON object", file=file)
    return value


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
    for name, placed in weight_map.items():
        if name not in tensors or tensors[name].file.name != placed:
            raise TensorMissingError(f"{INDEX_FILE} places it here, but it is not", file=path / placed, tensor=name)
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
