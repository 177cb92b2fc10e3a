"""Decode steps as CUDA graphs: one recorded forward pass for each of a few batch sizes, replayed over fixed buffers.

A decode step launches hundreds of small kernels, which the host can't issue as fast as a GPU runs them; a graph issues them
in one call. It reads its inputs from the addresses it was recorded with, so a step's ids, positions, slots and page tables
are written to a `StaticBatch` first, padded to a recorded size. Padding rows stand for a sequence of one token in a page of
nobody's, and as no kernel's result depends on how many rows there are, they change no bit of the others.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cai_runtime.engine.seats import StepNumbers
from cai_runtime.errors import KernelError
from cai_runtime.kernels.batch import AttentionBatch, PageTable
from cai_runtime.progress import progress_bar

if TYPE_CHECKING:
    from cai_runtime.models.registry import CausalLM

logger = logging.getLogger("cai_runtime.engine")

Forward = Callable[[], torch.Tensor]  # reads fixed inputs; its result lies at a fixed place


def batch_sizes(max_batch: int) -> tuple[int, ...]:
    """The sizes that are recorded: 1, 2, 4, 8, 16, then two for each doubling (24, 32, 48, 64, ...), the last `max_batch`.

    All are recorded when a model is opened, and a step takes the next larger size. Decoding reads the weights once for
    all rows, so the padding costs less than the recording of more sizes would."""
    sizes = [1, 2, 4, 8, 16]
    while sizes[-1] < max_batch:
        sizes += [sizes[-1] * 3 // 2, sizes[-1] * 2]
    return (*(size for size in sizes if size < max_batch), max_batch)


def table_widths(pages: int) -> tuple[int, ...]:
    """The widths of the page table that are recorded: 64 pages, then eight times as many, the last `pages`. Attention over a
    long cache is divided by the width it may have, so a short context does not pay for the longest."""
    widths = []
    width = 64
    while width < pages:
        widths.append(width)
        width *= 8
    return (*widths, pages)


class StaticBatch:
    """The inputs of a decode step at fixed addresses, for `size` sequences of one token each.

    pages: width of the page tables, enough for the longest sequence. scratch_pages: of each cache group a page that no
    sequence owns.
    """

    def __init__(
        self, size: int, *, pages: int, page_size: int, scratch_pages: Mapping[str, int], device: torch.device
    ):
        self.size, self._groups = size, tuple(scratch_pages)
        self._scratch = np.array(list(scratch_pages.values()), np.int32)
        self._padding = np.array([0, 0, 1, *self._scratch * page_size], np.int32)[:, None]
        # One tensor, so that a step's numbers travel in one copy: ids, positions, context_len, the slots of each group.
        shape, table_shape = (3 + len(self._groups), size), (len(self._groups), size, pages)
        self._numbers = torch.zeros(shape, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"

        def host(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int32, device="cpu", pin_memory=pinned)

        # Two, in turns: the copy of one step may be under way while the next one is written.
        self._hosts = [host(math.prod(shape)).view(shape) for _ in range(2)]
        self._host_tables = [host(math.prod(table_shape)) for _ in range(2)]
        ids, positions, context_len, *slots = self._numbers
        self.ids = ids
        self._tables = torch.zeros(table_shape, dtype=torch.int32, device=device)
        self.batch = AttentionBatch(
            positions=positions,
            query_start=torch.arange(size + 1, dtype=torch.int32, device=device),
            context_len=context_len,
            tables={n: PageTable(s, t) for n, s, t in zip(self._groups, slots, self._tables, strict=True)},
        )
        self.fill(None)

    def narrowed(self, width: int) -> AttentionBatch:
        """The batch with the first `width` columns of the page tables, the same memory."""
        tables = {name: replace(t, pages=t.pages[:, :width]) for name, t in self.batch.tables.items()}
        return replace(self.batch, tables=tables)

    def fill(self, step: StepNumbers | None) -> None:
        """Write the inputs of `step`, at most `size` sequences of one token each; the rest, or all of it, is padding."""
        count = 0 if step is None else len(step.ids)
        self._hosts.reverse()
        self._host_tables.reverse()
        host = self._hosts[0].numpy()
        host[:, count:] = self._padding
        # Only columns that are read: the tables are as wide as the longest context allows.
        width = 1 if step is None else step.width
        shape = (len(self._groups), self.size, width)
        tables = self._host_tables[0][: math.prod(shape)].view(shape)
        padded = tables.numpy()
        padded[:, count:] = self._scratch[:, None, None]
        if step is not None:
            host[:3, :count] = step.ids, step.positions, step.context_len
            for i, name in enumerate(self._groups):
                host[3 + i, :count], padded[i, :count] = step.tables[name]
        self._numbers.copy_(self._hosts[0], non_blocking=True)
        self._tables[:, :, :width].copy_(tables, non_blocking=True)


class CudaCapture:
    """Records forwards as CUDA graphs that share one pool of memory. Only one of them may be in use at a time."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, forward: Forward) -> Forward:
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                # Compiles kernels, loads modules, sizes work spaces: none of it may happen in a graph.
                for _ in range(2):
                    forward()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile: only this one's calls must be such as can be recorded.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                out = forward()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay


class DecodeGraphs:
    """A model's decode steps, all recorded by `record_all`; one that was not is recorded when it is needed.

    model: with its caches allocated, `scratch_pages` among their pages. max_batch: the most sequences of a step. pages: that
    one sequence may have. scratch_pages: see `StaticBatch`. capture: makes a forward repeatable; None: as CUDA graphs.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        max_batch: int,
        page_size: int,
        pages: int,
        scratch_pages: Mapping[str, int],
        capture: Callable[[Forward], Forward] | None = None,
    ):
        self.sizes, self.widths = batch_sizes(max_batch), table_widths(pages)
        self._page_size = page_size
        self._model = model
        self._buffers = partial(
            StaticBatch, pages=pages, page_size=page_size, scratch_pages=scratch_pages, device=model.device
        )
        self._capture = capture or CudaCapture(model.device)
        self._batches: dict[int, StaticBatch] = {}  # by size
        self._recorded: dict[tuple[int, int], Forward] = {}  # by size and width

    def takes(self, step: StepNumbers) -> bool:
        """Whether `step` is a pure decode step of a recorded size."""
        count = len(step.context_len)
        return 0 < count <= self.sizes[-1] and len(step.ids) == len(step.wanted) == count

    @torch.inference_mode()
    def prepare(self, step: StepNumbers, ids: torch.Tensor | None = None) -> Forward:
        """The recorded pass for `step`, its inputs written: calling it gives the logits of the padded batch, on the model's
        device, at a fixed place. ids: on the device, in place of the step's."""
        size = next(n for n in self.sizes if n >= len(step.ids))
        forward = self._get(size, next(w for w in self.widths if w >= step.width))
        self._batches[size].fill(step)
        if ids is not None:
            self._batches[size].ids[: len(ids)].copy_(ids)
        return forward

    @torch.inference_mode()
    def record_all(self, progress: bool | None = None) -> None:
        """Record every size and width, the largest first, so that the smaller ones find room in its memory."""
        begin = time.monotonic()
        shapes = [(size, width) for size in reversed(self.sizes) for width in reversed(self.widths)]
        with progress_bar("record", total=len(shapes), unit="graph", show=progress) as bar:
            for shape in shapes:
                self._get(*shape)
                bar.update()
        logger.info("recorded %d CUDA graphs in %.1f s", len(shapes), time.monotonic() - begin)

    def close(self) -> None:
        """Let go of graphs, their memory and the model."""
        self._recorded.clear()
        self._batches.clear()
        gone: Any = None
        self._model = self._capture = gone

    def _get(self, size: int, width: int) -> Forward:
        if (size, width) not in self._recorded:
            if size not in self._batches:
                self._batches[size] = self._buffers(size)
            # Recording runs the pass. The last step's inputs would have it write into pages that may be another's by now.
            self._batches[size].fill(None)
            ids, batch, model = self._batches[size].ids, self._batches[size].narrowed(width), self._model
            try:
                self._recorded[size, width] = self._capture(lambda: model.logits(model.forward(ids, batch)))
            except Exception as error:
                raise KernelError(
                    f"a decode step of {size} sequences can't be recorded as a CUDA graph ({error}): "
                    "open the engine with cuda_graphs=False"
                ) from error
        return self._recorded[size, width]
