"""Decode steps as CUDA graphs: one recorded forward pass for each of a few batch sizes, replayed over fixed buffers.

A decode step launches hundreds of small kernels, which the host can't issue as fast as a GPU runs them; a graph issues them
in one call. It reads its inputs from the addresses it was recorded with, so a step's ids, positions, slots and page table
are written to a `StaticBatch` first, padded to a recorded size. Padding rows stand for a sequence of one token in a page of
nobody's, and as no kernel's result depends on how many rows there are, they change no bit of the others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from cai_runtime.engine.seats import StepNumbers
from cai_runtime.errors import KernelError
from cai_runtime.kernels.batch import FULL, AttentionBatch
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

    pages: width of the page table, enough for the longest sequence. scratch_page: a page that no sequence owns.
    """

    def __init__(self, size: int, *, pages: int, page_size: int, scratch_page: int, device: torch.device):
        self.size, self._page_size, self._scratch_page = size, page_size, scratch_page
        # One tensor, so that a step's numbers travel in one copy: ids, positions, slots, context_len.
        self._numbers = torch.zeros(4, size, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._host = torch.zeros(4, size, dtype=torch.int32, device="cpu", pin_memory=pinned)
        self._host_table = torch.zeros(size * pages, dtype=torch.int32, device="cpu", pin_memory=pinned)
        ids, positions, slots, context_len = self._numbers
        self.ids = ids
        self._table = torch.full((size, pages), scratch_page, dtype=torch.int32, device=device)
        self.batch = AttentionBatch.of(
            positions=positions,
            slots=slots,
            query_start=torch.arange(size + 1, dtype=torch.int32, device=device),
            context_len=context_len,
            page_table=self._table,
        )
        self.fill(None)

    def narrowed(self, width: int) -> AttentionBatch:
        """The batch with the first `width` columns of the page table, the same memory."""
        tables = {name: replace(t, pages=t.pages[:, :width]) for name, t in self.batch.tables.items()}
        return replace(self.batch, tables=tables)

    def fill(self, step: StepNumbers | None) -> None:
        """Write the inputs of `step`, at most `size` sequences of one token each; the rest, or all of it, is padding."""
        count = 0 if step is None else len(step.ids)
        host, slot = self._host.numpy(), self._scratch_page * self._page_size
        host[:, count:] = ((0,), (0,), (slot,), (1,))
        width = 1
        if step is not None:
            slots, pages = step.tables[FULL]
            host[:, :count] = step.ids, step.positions, slots, step.context_len
            width = pages.shape[1]  # only columns that are read: the table is as wide as the longest context allows
        table = self._host_table[: self.size * width].view(self.size, width)
        table[count:] = self._scratch_page
        if step is not None:
            table.numpy()[:count] = pages
        self._numbers.copy_(self._host, non_blocking=True)
        self._table[:, :width].copy_(table, non_blocking=True)


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

    model: with its cache allocated, `scratch_page` among its pages. max_batch: the most sequences of a step. pages: that
    one sequence may have. capture: makes a forward repeatable; None: as CUDA graphs.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        max_batch: int,
        page_size: int,
        pages: int,
        scratch_page: int,
        capture: Callable[[Forward], Forward] | None = None,
    ):
        self.sizes, self.widths = batch_sizes(max_batch), table_widths(pages)
        self._page_size = page_size
        self._model = model
        self._buffers = partial(
            StaticBatch, pages=pages, page_size=page_size, scratch_page=scratch_page, device=model.device
        )
        self._capture = capture or CudaCapture(model.device)
        self._batches: dict[int, StaticBatch] = {}  # by size
        self._recorded: dict[tuple[int, int], Forward] = {}  # by size and width

    def takes(self, step: StepNumbers) -> bool:
        """Whether `step` is a pure decode step of a recorded size."""
        count = len(step.context_len)
        return 0 < count <= self.sizes[-1] and len(step.ids) == len(step.wanted) == count

    @torch.inference_mode()
    def prepare(self, step: StepNumbers) -> Forward:
        """The recorded pass for `step`, its inputs written: calling it gives the logits of the padded batch, on the model's
        device, at a fixed place."""
        size = next(n for n in self.sizes if n >= len(step.ids))
        forward = self._get(size, next(w for w in self.widths if w >= step.width))
        self._batches[size].fill(step)
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
