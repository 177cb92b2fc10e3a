"""Healing: distillation of the dense model (teacher) into the whole compressed model (student).

The loss is KL(teacher || student) over the next token (Hinton, Vinyals and Dean, "Distilling the knowledge in a neural
network", 2015). Healing trains cores (rounded in every forward pass), norms and biases. Embedding and head stay fixed.
Logits are computed for `POSITIONS` positions at a time.

The learning rate of a step is proportional to sqrt(divergence). A Muon step has a fixed length, and its noise adds to the
divergence in proportion to rate^2. The noise is thus the same share of the divergence for every model.

In mixed precision (Micikevicius et al., "Mixed precision training", 2018) matrix products run in bf16. Trained parameters,
hidden states between layers and the divergence stay fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cai_runtime.compressor.factor.embedding_head import Ends
from cai_runtime.compressor.stats.block_stack import Batch
from cai_runtime.compressor.stats.moments import MomentHooks, group_by_input, noting_inputs
from cai_runtime.compressor.stats.targets import Target
from cai_runtime.compressor.train.divergence import Divergence
from cai_runtime.compressor.train.logit_slices import states_of
from cai_runtime.compressor.train.optimizer import Metric, WhitenedMuon, core_metrics
from cai_runtime.compressor.train.student import TrainableLinear
from cai_runtime.compressor.work import Work

if TYPE_CHECKING:
    from cai_runtime.compressor.options import Options
    from cai_runtime.compressor.stats.weights import DenseWeights

WARMUP = 0.1  # share of the steps
POSITIONS = 256  # positions whose logits are in memory at once
STEP = "heal"
KEEP_EVERY = 8  # steps between states on disk
MOST = 2.0  # nats: the rate does not grow with the divergence above this
METRIC_BATCHES = 8  # the input metrics are estimated on the batches of this many steps
# Batches (audio windows) per step of a speech model. One window has about 50 tokens, too few for a gradient.
WINDOWS = 8


@dataclass(frozen=True)
class HealSettings:
    """Settings of `Healer`.

    steps: number of optimizer steps. rate: learning rate of `WhitenedMuon` at a divergence of 1 nat; linear warmup over the
    first tenth of the steps, then cosine decay to 0. batches: batches per step (gradient accumulation). mixed: run fp32
    models in mixed precision. seconds: time limit; the schedule then follows the clock, and `steps` is an upper bound.
    None: no time limit. keep_every: steps between states on disk.
    """

    steps: int
    rate: float
    batches: int = 1
    mixed: bool = False
    seconds: float | None = None
    keep_every: int = KEEP_EVERY

    @classmethod
    def of(cls, options: Options, *, speech: bool) -> HealSettings:
        return cls(options.heal_steps, options.heal_rate, WINDOWS if speech else 1, options.mixed)


def dense_pair(weights: DenseWeights, options: Options, ends: Ends) -> tuple[Any, Any]:
    """The student and the teacher: two copies of transformers' model in `options.dtype` on `options.device`.

    The student's embedding and head are rounded to their stores (see `Ends`); the caller replaces its linear layers. No
    parameter of the student requires a gradient yet.
    """
    from cai_runtime.stock.load import DTYPES

    pair: list[Any] = [weights.resident(DTYPES[options.dtype]).to(options.device) for _ in range(2)]
    student, teacher = pair
    student.requires_grad_(False)
    ends.round_weights(student)
    return student, teacher


class Healer:
    """Trains `student` in place. The step "heal" in the work directory holds the training state.

    student, teacher: transformers' models. Trains the student's parameters that require gradients. batches: used in order,
    cyclically. tick: called after every step.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        batches: Sequence[Batch],
        work: Work,
        settings: HealSettings,
        *,
        tick: Callable[[], object] = lambda: None,
    ):
        self._student, self._teacher = student, teacher
        self._batches, self._work, self._tick = batches, work, tick
        self._steps, self._per_step, self._mixed = settings.steps, settings.batches, settings.mixed
        self._seconds, self._keep_every = settings.seconds, settings.keep_every
        self._named = {name: p for name, p in student.named_parameters() if p.requires_grad}
        metrics = input_metrics(student, batches[: METRIC_BATCHES * self._per_step])
        self._divergence = Divergence()
        self._optimizer = WhitenedMuon(self._named.values(), settings.rate, metrics)
        if self._mixed:
            for model in (student, teacher):
                _cast_once(model)
        self.losses: list[float] = []  # mean divergence of each step, in nats per position

    def run(self) -> None:
        """Train to the end of the schedule, from the state in the work directory if there is one."""
        done = self._restore()
        for _ in range(done):
            self._tick()
        began, step = monotonic(), done
        while step < self._steps:
            gone = step / self._steps if self._seconds is None else (monotonic() - began) / self._seconds
            if gone >= 1:
                break
            at = self._per_step * step
            taken = [self._batches[(at + k) % len(self._batches)] for k in range(self._per_step)]
            warm = max(1.0, WARMUP * self._steps)
            risen = (step + 1) / warm if self._seconds is None else gone / WARMUP
            share = min(1.0, risen) * (0.5 + 0.5 * math.cos(math.pi * gone))
            self.losses.append(sum(self._gradients(batch) for batch in taken) / len(taken))
            self._optimizer.set_rate(share * min(self.losses[-1], MOST) ** 0.5)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % self._keep_every == 0:
                self._keep(step)
            self._tick()
        if step > done and step % self._keep_every:
            self._keep(step)

    def _gradients(self, batch: Batch) -> float:
        """Accumulate the gradients of one batch. Returns its mean divergence in nats per position."""
        with torch.no_grad(), self._precision():
            wanted = states_of(self._teacher, batch)
        with torch.enable_grad(), self._precision():
            found = states_of(self._student, batch)
        leaf = found.hidden.detach().requires_grad_()
        flat, flat_wanted = leaf.flatten(0, 1), wanted.hidden.flatten(0, 1)
        if "labels" in batch:  # -100 marks the prompt, which is not predicted
            labelled = (batch["labels"].flatten() != -100).to(flat.device)
            flat, flat_wanted = flat[labelled], flat_wanted[labelled]
        count, total = flat.shape[0], 0.0
        for start in range(0, count, POSITIONS):
            part = slice(start, start + POSITIONS)
            with torch.no_grad(), self._precision():
                target = wanted.logits(flat_wanted[part])
            with torch.enable_grad(), self._precision():
                logits = found.logits(flat[part])
            divergence, gradient = self._divergence(logits, target)
            logits.backward(gradient.div_(count * self._per_step).to(logits.dtype))
            total += divergence / count
        found.hidden.backward(leaf.grad)
        return total

    def _precision(self) -> torch.autocast:
        device = next(iter(self._named.values())).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self._mixed)

    def _restore(self) -> int:
        """Load the state on disk. Returns the number of finished steps, 0 without a state."""
        if not self._work.has(STEP):
            return 0
        tensors, record = self._work.load(STEP)
        self.losses = list(record["losses"])
        with torch.no_grad():
            for name, p in self._named.items():
                p.copy_(tensors[f"p|{name}"])
                for key in record["state"].get(name, []):
                    self._optimizer.state[p][key] = tensors[f"{key}|{name}"].to(p.device)
        return int(record["steps"])

    def _keep(self, steps: int) -> None:
        tensors: dict[str, torch.Tensor] = {}
        kept: dict[str, list[str]] = {}
        for name, p in self._named.items():
            state = self._optimizer.state.get(p, {})  # empty until the parameter's first gradient
            tensors |= {f"p|{name}": p, **{f"{key}|{name}": value for key, value in state.items()}}
            kept[name] = list(state)
        self._work.save(STEP, tensors, {"steps": steps, "losses": self.losses, "state": kept}, again=True)


def _cast_once(model: Any) -> None:
    """Cast frozen fp32 weights to bf16 once, as autocast would at every use. Casting the head alone takes a tenth of a step.
    An embedding tied to such a weight stays fp32."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.float32 and not module.weight.requires_grad:
            module.weight = nn.Parameter(module.weight.detach().bfloat16(), requires_grad=False)


def input_metrics(student: Any, batches: Sequence[Batch]) -> dict[nn.Parameter, Metric]:
    """The metrics (see `core_metrics`) of the student's `TrainableLinear` layers, estimated on `batches`."""
    layers = {name: module for name, module in student.named_modules() if isinstance(module, TrainableLinear)}
    targets = [Target(name, layer) for name, layer in layers.items()]
    with torch.no_grad():
        with noting_inputs(targets) as read:
            states_of(student, batches[0])
        # A layer without inputs (an expert that was never routed to) gets no metric.
        targets = [target for target in targets if target.name in read]
        groups = group_by_input(targets, read)
        read.clear()
        hooks = MomentHooks(groups, gradients=False, device=next(student.parameters()).device)
        with hooks.open():
            for batch in batches:
                states_of(student, batch)
    grams = hooks.moments().inputs
    return core_metrics([(layers[target.name], grams[target.name]) for target in targets])
