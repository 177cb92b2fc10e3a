"""A slim checkpoint back to a stock one: every module multiplied out, as any Hugging Face library reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cai_runtime.errors import InvalidConfigError, NonFiniteTensorError
from cai_runtime.progress import progress_bar
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.slim.shard import DTYPES
from cai_runtime.slim.spec import STORES

if TYPE_CHECKING:
    import torch

EXPORT_DTYPES = ("bf16", "fp16", "fp32")
DEFAULT_SHARD_BYTES = 1 << 30


def export_dense(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str = "bf16",
    keep: float | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Path:
    """Write the dense model that the slim checkpoint `src` stands for, and return `dst`.

    config.json (without quantization_config), tokenizer, chat template, generation settings and licence go along. Weights
    are multiplied out in fp32 and rounded once. Memory: one dense tensor in fp32 beside a shard. `dst` is complete or
    absent.

    Args:
        src: a slim checkpoint's directory. A dense one is written in `dtype`, too.
        dtype: of every floating tensor, "bf16", "fp16" or "fp32".
        keep: of an elastic checkpoint: which of its sizes to multiply out; None: the largest.
        max_shard_bytes: see `CheckpointWriter`.
        overwrite: replace an existing `dst`, once the new one is complete.
        progress: show a bar (None: only when stderr is a terminal).

    Raises:
        CheckpointError: `src` can't be read or has no such `keep`, see `Checkpoint.open`; a value is too large for fp16.
        CheckpointWriteError: `dst` is taken, is `src`, the disk is full, or the system refused. Nothing is left.
    """
    from cai_runtime.slim.writer import CheckpointWriter

    src, dst = Path(src), Path(dst)
    if dtype not in EXPORT_DTYPES:
        raise InvalidConfigError(f"dtype {dtype!r} is none of {', '.join(EXPORT_DTYPES)}")
    with Checkpoint.open(src, keep) as checkpoint:
        name = DTYPES[STORES[dtype].dtype][0]
        config = {k: v for k, v in checkpoint.config.items() if k != "torch_dtype"} | {"dtype": name}
        with (
            CheckpointWriter(
                dst, config=config, source_dir=src, max_shard_bytes=max_shard_bytes, overwrite=overwrite
            ) as writer,
            progress_bar("export", total=checkpoint.nbytes, unit="B", show=progress, unit_scale=True) as bar,
        ):
            for tensor_name, tensor, nbytes in _dense_tensors(checkpoint, name):
                writer.add_tensor(tensor_name, tensor)
                bar.update(nbytes)
            return writer.finish()


def _dense_tensors(checkpoint: Checkpoint, dtype_name: str) -> Iterator[tuple[str, torch.Tensor, int]]:
    """(name, tensor, bytes read of the checkpoint) of the dense model. Pages of the file are let go one by one."""
    import torch

    dtype = getattr(torch, dtype_name)
    infos = checkpoint.tensors()

    def rounded(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        made = tensor.to(dtype)
        if dtype == torch.float16 and not bool(made.isfinite().all()):
            raise NonFiniteTensorError("a value exceeds the range of fp16; export as bf16 or fp32", tensor=name)
        return made

    of_modules: set[str] = set()
    for name in checkpoint.modules:
        parts = checkpoint.module_tensors(name)
        of_modules.update(parts)
        module = checkpoint.module(name)
        nbytes = sum(infos[part].nbytes for part in parts)
        yield f"{name}.weight", rounded(f"{name}.weight", module.dense(torch.float32)), nbytes
        if module.bias is not None:
            yield f"{name}.bias", rounded(f"{name}.bias", module.bias), 0
        checkpoint.release(parts)
    for name, info in infos.items():
        if name not in of_modules:
            yield name, rounded(name, checkpoint.tensor(name)), info.nbytes
            checkpoint.release(name)
