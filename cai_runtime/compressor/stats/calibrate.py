"""The forward and backward pass over the calibration text, with one block in memory.

Forward: the hidden states before each block are written to disk. Backward: from the last block to the first, each block runs
again with gradients. This gives the loss gradients at the outputs of its linear layers and at its input, which are written
to disk, too. It is gradient checkpointing at every block (Chen, Xu, Zhang and Guestrin, "Training deep nets with sublinear
memory cost", 2016).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cai_runtime.compressor.stats.block_stack import Batch, BlockModel, Call, Entry, Stack
from cai_runtime.compressor.stats.moments import BlockMoments, MomentHooks, group_by_input, noting_inputs
from cai_runtime.compressor.stats.targets import InputGroup, Target
from cai_runtime.compressor.work import Work
from cai_runtime.errors import CompressionError

Loss = Callable[[Any, Batch], torch.Tensor]


def next_token_loss(output: Any, batch: Batch) -> torch.Tensor:
    """Cross entropy of the next token in nats, summed over tokens, a scalar. With a sum, a token's gradient does not depend
    on the batch it is in.

    batch: "labels" [batch, tokens] are the targets of the logits at the same position, -100: none. Without "labels" the
    targets are the next "input_ids".
    """
    if "labels" in batch:
        logits, labels = output.logits, batch["labels"]
    else:
        logits, labels = output.logits[:, :-1], batch["input_ids"][:, 1:]
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten().to(logits.device), reduction="sum", ignore_index=-100
    )


@dataclass(frozen=True)
class BlockId:
    """Block `index` of stack `stack`. An index equal to the number of blocks stands for the end of the stack."""

    stack: int
    index: int

    def step(self, what: str) -> str:
        """Name of the block's step `what` in the work directory."""
        return f"{what}-{self.stack}-{self.index:04d}"


class CalibrationPass:
    """Hidden states and gradients of the dense model on the calibration text, held in a work directory.

    targets: the linear layers to compress, by name. batches: inputs of the model. loss: default next-token cross entropy.
    tick: called for every block that `forward` and `backward` finish.
    """

    def __init__(
        self,
        model: BlockModel,
        targets: dict[str, Target],
        batches: Sequence[Batch],
        work: Work,
        *,
        loss: Loss = next_token_loss,
        tick: Callable[[], object] = lambda: None,
    ):
        self.model = model
        self.batches = batches
        self._targets = targets
        self._work = work
        self._loss = loss
        self.tick = tick
        self._entered: tuple[int, list[Entry]] | None = None

    def blocks(self) -> list[BlockId]:
        """All blocks, in the order in which the model runs them."""
        return [BlockId(s, i) for s, stack in enumerate(self.model.stacks) for i in range(len(stack))]

    def stack(self, at: BlockId) -> Stack:
        return self.model.stacks[at.stack]

    def targets(self, at: BlockId) -> list[Target]:
        """The linear layers to compress in a block."""
        inside = f"{self.stack(at).block_name(at.index)}."
        return [target for name, target in self._targets.items() if name.startswith(inside)]

    def forward(self) -> None:
        """Run all blocks of all stacks, from the last finished one. The step "hidden-s-i" holds the states before block i of
        stack s; i = number of blocks: after the last one.

        Raises CompressionError when hidden states are not finite.
        """
        for s, stack in enumerate(self.model.stacks):
            start = max((i for i in range(len(stack) + 1) if self._work.has(BlockId(s, i).step("hidden"))), default=-1)
            if start < 0:
                start, states = 0, [entry.hidden for entry in self.entries(s)]
                self._save("hidden", BlockId(s, 0), states)
            for _ in range(start):
                self.tick()
            for i in range(start, len(stack)):
                at = BlockId(s, i)
                states = self._run_block(at)
                if not all(bool(state.isfinite().all()) for state in states):
                    raise CompressionError(
                        f"the hidden states after {stack.block_name(i)} are not finite: try --dtype fp32"
                    )
                self._save("hidden", BlockId(s, i + 1), states)
                self.tick()

    @torch.no_grad()
    def _run_block(self, at: BlockId) -> list[torch.Tensor]:
        with self.model.loaded(self.stack(at), at.index) as block:
            states = self.hidden(at)
            return [
                entry.calls[at.index](block, state) for entry, state in zip(self.entries(at.stack), states, strict=True)
            ]

    def backward(self, visit: Callable[[BlockId], None]) -> None:
        """Backpropagate from the loss to the first block. The step "grad-s-i" holds the gradients before block i of stack s.

        visit: called for each block, last block first, once the gradients after it are saved. On return those before the
        block must be saved, too; `moments` with `gradients` does that.
        """
        for s in range(len(self.model.stacks) - 1, -1, -1):
            last = BlockId(s, len(self.model.stacks[s]))
            if not self._work.has(last.step("grad")):
                self._save("grad", last, self._top_gradients(s))
            for i in range(len(self.model.stacks[s]) - 1, -1, -1):
                visit(BlockId(s, i))
                self.tick()

    def _top_gradients(self, s: int) -> list[torch.Tensor]:
        """The loss gradients at the output of stack s, per batch, through the head or through the next stack's calls."""
        found = []
        for number, batch in enumerate(self.batches):
            finals = [state.requires_grad_() for state in self._finals(number, s + 1)]
            with torch.enable_grad():
                if s + 1 == len(self.model.stacks):
                    self._loss(self.model.finish(batch, finals), batch).backward()
                else:
                    entry = self.model.enter(s + 1, batch, finals)
                    sides, _ = self._work.load(BlockId(s + 1, 0).step("grad"))
                    tensors = _sides(entry)
                    roots = [tensor for tensor in tensors if tensor.requires_grad]
                    torch.autograd.backward(
                        roots, [sides[f"side-{number}-{k}"].to(root) for k, root in enumerate(roots)]
                    )
            gradient = finals[-1].grad
            assert gradient is not None
            found.append(gradient)
        return found

    def logits(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of batch `number` and the loss gradients at them, [batch, tokens, vocabulary] fp32 each. Needs
        `forward`."""
        with torch.no_grad():
            output = self.finish(number)
        leaf = output.logits = output.logits.float().requires_grad_()
        with torch.enable_grad():
            self._loss(output, self.batches[number]).backward()
        assert leaf.grad is not None
        return leaf.detach(), leaf.grad

    def enter(self, s: int, number: int) -> Entry:
        """The entry of stack s for batch `number`, computed with the model's current parameters."""
        return self.model.enter(s, self.batches[number], self._finals(number, s))

    def finish(self, number: int) -> Any:
        """The model's output for batch `number`, from the hidden states after the last blocks."""
        return self.model.finish(self.batches[number], self._finals(number, len(self.model.stacks)))

    def moments(self, at: BlockId, *, gradients: bool) -> tuple[list[InputGroup], BlockMoments]:
        """The block's input groups and moments. With `gradients` it also saves the gradients before the block."""
        entries, states = self.entries(at.stack, graph=gradients), self.hidden(at)
        with self.model.loaded(self.stack(at), at.index) as block:
            groups = self.groups(at, block)
            hooks = MomentHooks(groups, gradients=gradients, device=self.model.device)
            with hooks.open():
                if not gradients:
                    with torch.no_grad():
                        for entry, state in zip(entries, states, strict=True):
                            entry.calls[at.index](block, state)
                else:
                    self._differentiate(at, block, entries, states)
            return groups, hooks.moments()

    def _differentiate(self, at: BlockId, block: nn.Module, entries: list[Entry], states: list[torch.Tensor]) -> None:
        after, _ = self._work.load(BlockId(at.stack, at.index + 1).step("grad"))
        before: dict[str, torch.Tensor] = {}
        for number, (entry, state) in enumerate(zip(entries, states, strict=True)):
            leaf = state.clone().requires_grad_()
            call, sides = _with_leaves(entry.calls[at.index])
            with torch.enable_grad():
                call(block, leaf).backward(after[f"{number}"].to(state))
            assert leaf.grad is not None
            before[f"{number}"] = leaf.grad
            # Gradients of side inputs, such as the encoder's output in cross attention. They add up over the blocks.
            for k, side in enumerate(sides):
                name = f"side-{number}-{k}"
                assert side.grad is not None
                before[name] = side.grad + after[name].to(side.grad) if name in after else side.grad
        self._work.save(at.step("grad"), before)

    @torch.no_grad()
    def groups(self, at: BlockId, block: nn.Module) -> list[InputGroup]:
        """The block's targets, grouped by input tensor. block: loaded."""
        targets = self.targets(at)
        with noting_inputs(targets) as read:
            self.entries(at.stack)[0].calls[at.index](block, self.hidden(at, only=0)[0])
        return group_by_input(targets, read)

    def hidden(self, at: BlockId, *, only: int | None = None) -> list[torch.Tensor]:
        """The dense model's hidden states before the block, [batch, tokens, hidden] per batch. only: of this batch alone."""
        return self._states(at.step("hidden"), only)

    def gradients(self, at: BlockId) -> list[torch.Tensor]:
        """The loss gradients at `hidden(at)`, in the same shapes. Needs `backward` past the block."""
        return self._states(at.step("grad"), None)

    def _states(self, step: str, only: int | None) -> list[torch.Tensor]:
        tensors, _ = self._work.load(step)
        numbers = range(len(self.batches)) if only is None else [only]
        return [tensors[f"{number}"].to(self.model.device) for number in numbers]

    def entries(self, s: int, *, graph: bool = False) -> list[Entry]:
        """The entries of stack s, one per batch. Those of the last call are cached. graph: with the autograd graph from the
        outputs of earlier stacks."""
        graph = graph and s > 0
        key = s + len(self.model.stacks) * graph
        if self._entered is None or self._entered[0] != key:
            found = []
            for number, batch in enumerate(self.batches):
                finals = self._finals(number, s)
                if graph:
                    finals = [final.requires_grad_() for final in finals]
                with torch.set_grad_enabled(graph):
                    found.append(self.model.enter(s, batch, finals))
            self._entered = key, found
        return self._entered[1]

    def _finals(self, number: int, before: int) -> list[torch.Tensor]:
        """The outputs of all stacks before stack `before`, for batch `number`."""
        stacks = self.model.stacks[:before]
        return [self.hidden(BlockId(s, len(stack)), only=number)[0] for s, stack in enumerate(stacks)]

    def _save(self, what: str, at: BlockId, states: list[torch.Tensor]) -> None:
        self._work.save(at.step(what), {f"{number}": state for number, state in enumerate(states)})


def _sides(entry: Entry) -> list[torch.Tensor]:
    """The distinct tensors that require gradients among the arguments of the blocks."""
    found: dict[int, torch.Tensor] = {}
    for call in entry.calls:
        for value in [*call.args, *call.kwargs.values()]:
            if isinstance(value, torch.Tensor) and value.requires_grad:
                found[id(value)] = value
    return list(found.values())


def _with_leaves(call: Call) -> tuple[Call, list[torch.Tensor]]:
    """The call with every tensor that requires gradients replaced by a leaf of the same value, and those leaves."""
    leaves: dict[int, torch.Tensor] = {}

    def leaf(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.requires_grad:
            return leaves.setdefault(id(value), value.detach().clone().requires_grad_())
        return value

    args = tuple(leaf(value) for value in call.args)
    kwargs = {key: leaf(value) for key, value in call.kwargs.items()}
    return Call(args, kwargs), list(leaves.values())
