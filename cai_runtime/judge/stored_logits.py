"""One model's distributions on disk, while another is in memory to be compared with."""

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

ROWS = 128  # positions whose distributions are held in fp32 at a time


class StoredLogits:
    """Log probabilities, fp16 [tokens of all windows, vocabulary], in a temporary file that is made with the first
    window.

    lengths: tokens of each window.
    """

    def __init__(self, folder: Path, lengths: Sequence[int]):
        self._file = folder / "log_probabilities.npy"
        self._starts = [sum(lengths[:k]) for k in range(len(lengths) + 1)]
        self._rows: np.ndarray | None = None

    @classmethod
    @contextmanager
    def in_temporary_file(cls, lengths: Sequence[int]) -> Iterator[StoredLogits]:
        with tempfile.TemporaryDirectory(prefix="cai-eval-") as folder:
            store = cls(Path(folder), lengths)
            try:
                yield store
            finally:
                store._rows = None

    def put(self, k: int, logits: torch.Tensor) -> None:
        """Keep window k's logits, fp32 [tokens, vocabulary]. Raises CompressionError when the disk has no room for
        all."""
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
            # Below fp16's range a probability is nothing.
            found = rows.log_softmax(-1).clamp(min=-65504.0).half().cpu().numpy()
            self._rows[start : start + len(found)] = found
            start += len(found)

    def get(self, k: int) -> torch.Tensor:
        """Logits whose softmax is what was stored."""
        import numpy as np

        assert self._rows is not None
        rows = np.asarray(self._rows[self._starts[k] : self._starts[k + 1]])
        return torch.from_numpy(rows.astype(np.float32))
