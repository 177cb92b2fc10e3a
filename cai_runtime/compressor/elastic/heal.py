"""Healing of an elastic checkpoint: trains its lowrank cores for all keeps.

Each step opens the model at another keep and trains the leading rows and columns in use there (Yu, Yang, Xu, Yang and Huang,
"Slimmable neural networks", 2019; Kusupati et al., "Matryoshka representation learning", 2022). They are part of all larger
ranks. The keeps form a golden-ratio sequence, so that few steps cover the range evenly.

The divergence at a small keep is many times that at a large keep, and its gradients would dominate. So the loss of a step is
log(divergence): relative improvements count equally at all keeps. Dense forms, norms and biases are not trained, so that
large keeps stay as close to the original as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cai_runtime.compressor.factor.cores import StoredModule
from cai_runtime.compressor.stats.block_stack import Batch
from cai_runtime.compressor.train.heal import Healer, HealSettings
from cai_runtime.compressor.train.student import TrainableLinear, no_weight, replace_module
from cai_runtime.compressor.work import Work
from cai_runtime.slim.elastic import ElasticTable
from cai_runtime.slim.spec import ModuleSpec

GOLDEN = 0.6180339887498949
LEAST_DIVERGENCE = 0.1  # nats: lower bound of the divergence that gradients are divided by


class NestedLinear(TrainableLinear):
    """A lowrank `TrainableLinear` truncated to `rank`, without bias: y = core_1[:, :rank] core_0[:rank] x."""

    def __init__(self, module: StoredModule):
        super().__init__(module)
        self.rank: int = int(module.cores[0].shape[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = (core().to(x.dtype) for core in self.parts())
        return F.linear(F.linear(x, first[: self.rank]), second[:, : self.rank])


class ElasticLinear(nn.Module):
    """A layer with all its forms in place of a torch.nn.Linear, one of them in use: y = W x + bias, x [..., in].

    forms: the one that `quantization_config` lists, and the second form, if any. bias: [out]; None: none. dtype: of the
    replaced weight. Only lowrank cores have gradients. At first the lowrank form, if any, is in use at its full rank.
    """

    whole: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, forms: Sequence[StoredModule], bias: torch.Tensor | None, dtype: torch.dtype):
        super().__init__()
        whole, lowrank = forms[0], forms[-1]
        self.spec, self.stands_for = whole.spec, dtype
        self.register_buffer("whole", whole.dense().to(dtype) if whole.spec.kind == "dense" else None)
        self.register_buffer("bias", bias)
        self.lowrank = NestedLinear(lowrank) if lowrank.spec.kind == "lowrank" else None
        self.use(lowrank.spec)

    @property
    def weight(self) -> torch.Tensor:
        """See `TrainableLinear.weight`."""
        held = next(iter((*self.parameters(), *self.buffers())))
        return no_weight(self.spec, self.stands_for, held.device)

    def use(self, spec: ModuleSpec) -> None:
        """Use the form of this spec's kind, at the rank of the spec."""
        self.dense = spec.kind == "dense"
        if self.lowrank is not None and isinstance(spec.rank, int):
            self.lowrank.rank = spec.rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.dense or self.lowrank is None:
            assert self.whole is not None
            return F.linear(x, self.whole, self.bias)
        y = self.lowrank(x)
        return y if self.bias is None else y + self.bias


class ElasticHealer(Healer):
    """A `Healer` for a student with `ElasticLinear` layers. Further arguments as in `Healer`.

    table, specs: of the elastic checkpoint, see `ElasticTable.at`.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        batches: Sequence[Batch],
        work: Work,
        settings: HealSettings,
        table: ElasticTable,
        specs: dict[str, ModuleSpec],
        *,
        tick: Callable[[], object] = lambda: None,
    ):
        super().__init__(student, teacher, batches, work, settings, tick=tick)
        self._table, self._specs = table, specs
        self._layers = {name: m for name, m in student.named_modules() if isinstance(m, ElasticLinear)}
        self.keeps = healing_keeps(table, specs, settings.steps)
        self._optimizer.register_step_pre_hook(self._weigh)

    def open_at(self, keep: float) -> None:
        """Set all layers to their forms and ranks at this keep."""
        for name, spec in self._table.at(self._specs, keep).modules.items():
            self._layers[name].use(spec)

    def _gradients(self, batch: Batch) -> float:
        self.open_at(self.keeps[len(self.losses)])
        return super()._gradients(batch)

    def _weigh(self, *_: object) -> None:
        """Turn the accumulated gradients of the divergence into those of its logarithm: divide by the divergence."""
        divergence = max(self.losses[-1], LEAST_DIVERGENCE)
        for p in self._named.values():
            # Parameters not in use get a zero gradient, so that their momentum decays.
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.div_(divergence)


def healing_keeps(table: ElasticTable, specs: dict[str, ModuleSpec], steps: int) -> list[float]:
    """One keep per step, spread evenly over the keeps at which any layer is lowrank. Every prefix is spread evenly, too."""
    low, high = table.keep
    elastic = {module.name for module in table.modules if module.least is not None}
    keeps: list[float] = []
    share = 0.5
    while len(keeps) < steps:
        keep = low + (high - low) * share
        share = (share + GOLDEN) % 1
        if any(spec.kind == "lowrank" for name, spec in table.at(specs, keep).modules.items() if name in elastic):
            keeps.append(keep)
    return keeps


def put_forms(student: nn.Module, layers: dict[str, list[StoredModule]], dtype: torch.dtype, device: str) -> None:
    """Replace a block's layers in transformers' model by `ElasticLinear` layers, which take over the biases.

    layers: forms by name. dtype: of the replaced weights. device: of the new layers.
    """
    for name, forms in layers.items():
        dense: Any = student.get_submodule(name)
        bias = dense.bias
        layer = ElasticLinear(forms, None if bias is None else bias.detach(), dtype)
        replace_module(student, name, layer.to(device))


def healed_forms(name: str, forms: list[StoredModule], healed: dict[str, torch.Tensor]) -> list[StoredModule]:
    """The forms of layer `name` with trained lowrank cores. healed: trained parameters by their names in the student."""
    lowrank = TrainableLinear(forms[-1]) if forms[-1].spec.kind == "lowrank" else None
    if lowrank is None:
        return forms
    with torch.no_grad():
        for key, parameter in lowrank.named_parameters():
            if f"{name}.lowrank.{key}" in healed:
                parameter.copy_(healed[f"{name}.lowrank.{key}"])
    return [*forms[:-1], lowrank.stored()]
