"""Stores one model's log probabilities on disk, so that only the other model must be in memory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cai_runtime.errors import CompressionError

if TYPE_CHECKING:
    import numpy as np

ROWS = 128  # positions whose fp32 distributions are in memory at a time


class StoredLogits:
    """Log probabilities, fp16 [tokens of all windows, vocabulary], in a file that the first `put` creates.

    folder: where the file lies. lengths: tokens of each window.
    """

    def __init__(self, folder: Path, lengths: Sequence[int]):
        self._file = folder / "log_probabilities.npy"
        self._starts = [sum(lengths[:k]) for k in range(len(lengths) + 1)]
        self._rows: np.ndarray | None = None

    @classmethod
    @contextmanager
    def in_temporary_file(cls, lengths: Sequence[int]) -> Iterator[StoredLogits]:
        """A store in a temporary directory, removed at the end."""
        with tempfile.TemporaryDirectory(prefix="cai-eval-") as folder:
            store = cls(Path(folder), lengths)
            try:
                yield store
            finally:
                store._rows = None

    def put(self, k: int, logits: torch.Tensor) -> None:
        """Store window k's logits, fp32 [tokens, vocabulary]. Raises CompressionError if the disk lacks room for all."""
        import numpy as np

        if self._rows is None:
            shape = (self._starts[-1], logits.shape[1])
            need, free = 2 * shape[0] * shape[1], shutil.disk_usage(self._file.parent).free
            if need > free:
                raise CompressionError(
                    f"the reference's log probabilities take {need >> 20} MiB in {self._file.parent.parent}, which has "
                    f"{free >> 20}: fewer --tokens, or TMPDIR elsewhere"
                )
            self._rows = np.lib.format.open_memmap(self._file, mode="w+", dtype=np.float16, shape=shape)
        start = self._starts[k]
        for rows in logits.split(ROWS):
            # fp16 has no smaller value; the probability is 0 either way.
            found = rows.log_softmax(-1).clamp(min=-65504.0).half().cpu().numpy()
            self._rows[start : start + len(found)] = found
            start += len(found)

    def get(self, k: int) -> torch.Tensor:
        """Window k's log probabilities, fp32 [tokens, vocabulary], as logits."""
        import numpy as np

        assert self._rows is not None
        rows = np.asarray(self._rows[self._starts[k] : self._starts[k + 1]])
        return torch.from_numpy(rows.astype(np.float32))
