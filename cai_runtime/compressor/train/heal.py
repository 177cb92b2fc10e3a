"""The whole compressed model, trained to predict what the original predicts.

The loss is the Kullback-Leibler divergence of the original model's distribution over the next token from the compressed
one's (Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015). All cores, in their rounding,
norms and biases are trained; the embedding and the head are not. Logits exist for a few positions at a time.

A step's rate goes with the root of its divergence. The steps are of a given length, and what a step's noise adds to the
divergence grows with the square of it: as a share of what there is to mend, it is the same for a model that has lost much
and for one that has lost little.

In mixed precision (Micikevicius et al., "Mixed precision training", 2018) the products are of bf16, while what is trained,
the states between the layers and the divergence are fp32.
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
POSITIONS = 256  # whose logits are in memory at once
STEP = "heal"
KEEP_EVERY = 8  # steps between states on disk
MOST = 2.0  # nats: a model that has lost more does not take longer steps
METRIC_BATCHES = 8  # times those of a step: from which the layers' inputs are known
# Of a speech model, whose batches are of one window, a step. A window has some 50 tokens, most of which say little.
WINDOWS = 8


@dataclass(frozen=True)
class HealSettings:
    """rate: of `WhitenedMuon` at a divergence of 1 nat; it rises over the first tenth of the steps and falls along a cosine.
    batches: of a step, whose gradients are added up. mixed: whether fp32 models are run in mixed precision.

    seconds: healing stops by the clock, after `steps` steps at most, and the rate follows the time; None: by steps alone.
    keep_every: steps between states on disk."""

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
    """Twice transformers' model with all its weights: the student, whose layers are still to be replaced, with embedding and
    head as they will be stored (see `Ends`); and the teacher. Nothing of them is to be trained."""
    from cai_runtime.stock.load import DTYPES

    pair: list[Any] = [weights.resident(DTYPES[options.dtype]).to(options.device) for _ in range(2)]
    student, teacher = pair
    student.requires_grad_(False)
    ends.round_weights(student)
    return student, teacher


class Healer:
    """Trains `student` in place; "heal" in the work directory keeps the state of the training.

    student, teacher: transformers' models, the student's parameters that require gradients are trained. batches: taken
    in order, again and again.
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
        """Add this batch's share of the gradients. Returns its divergence."""
        with torch.no_grad(), self._precision():
            wanted = states_of(self._teacher, batch)
        with torch.enable_grad(), self._precision():
            found = states_of(self._student, batch)
        leaf = found.hidden.detach().requires_grad_()
        flat, flat_wanted = leaf.flatten(0, 1), wanted.hidden.flatten(0, 1)
        if "labels" in batch:  # what stands before them is given to the model, not predicted by it
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
        """Go on from the state on disk; the number of steps that are done."""
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
            state = self._optimizer.state.get(p, {})  # nothing where no gradient has come yet
            tensors |= {f"p|{name}": p, **{f"{key}|{name}": value for key, value in state.items()}}
            kept[name] = list(state)
        self._work.save(STEP, tensors, {"steps": steps, "losses": self.losses, "state": kept}, again=True)


def _cast_once(model: Any) -> None:
    """Make what autocast would cast at every use, a weight that is not trained, bf16 for good; the head's is a tenth of a
    step. An embedding that was tied to it stays fp32."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.float32 and not module.weight.requires_grad:
            module.weight = nn.Parameter(module.weight.detach().bfloat16(), requires_grad=False)


def input_metrics(student: Any, batches: Sequence[Batch]) -> dict[nn.Parameter, Metric]:
    """The metrics of a model's `TrainableLinear`s, see `core_metrics`, by what they are given in these batches."""
    layers = {name: module for name, module in student.named_modules() if isinstance(module, TrainableLinear)}
    targets = [Target(name, layer) for name, layer in layers.items()]
    with torch.no_grad():
        with noting_inputs(targets) as read:
            states_of(student, batches[0])
        # One that is not called (an expert that was not chosen) is trained as it is.
        targets = [target for target in targets if target.name in read]
        groups = group_by_input(targets, read)
        read.clear()
        hooks = MomentHooks(groups, gradients=False, device=next(student.parameters()).device)
        with hooks.open():
            for batch in batches:
                states_of(student, batch)
    grams = hooks.moments().inputs
    return core_metrics([(layers[target.name], grams[target.name]) for target in targets])
