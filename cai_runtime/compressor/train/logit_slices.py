"""From a model's last hidden states to its logits, for a few positions at a time.

Logits of all positions would be gigabytes. What lies between is not the head alone: some models scale the logits, or bend
them into a range (Gemma 2). So transformers' own code behind the blocks is run, on states that are handed to it.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cai_runtime.compressor.stats.block_stack import Batch, patched
from cai_runtime.errors import UnsupportedModelError

STATES = "last_hidden_state"


@dataclass(frozen=True)
class States:
    """hidden: [batch, tokens, hidden], of transformers' `model` on `inputs`, with their graph. output: of its `body`."""

    model: Any
    body: nn.Module
    inputs: Batch
    output: Any

    @property
    def hidden(self) -> torch.Tensor:
        states: torch.Tensor = self.output[STATES]
        return states

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The model's logits [n, vocabulary] for any of its last hidden states, [n, hidden]."""
        output = type(self.output)(**{**self.output, STATES: states[None]})
        with patched(self.body, lambda *_args, **_kwargs: output):
            logits: torch.Tensor = self.model(**self.inputs, use_cache=False).logits
        return logits.squeeze(0)  # whose gradient is a view, too


def states_of(model: Any, batch: Batch) -> States:
    """Run a transformers model up to its head. Labels are for the loss and not handed in.

    Raises UnsupportedModelError when it is not made of a model that gives its last hidden states and a head.
    """
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    outer = [m for name, m in model.named_modules() if name and m is not table and _holds(m, table)]
    seen: dict[nn.Module, Any] = {}
    with ExitStack() as hooks:
        for module in outer:
            hooks.callback(module.register_forward_hook(lambda m, _args, output: seen.update({m: output})).remove)
        if head is not None:
            hooks.callback(head.register_forward_pre_hook(_stop).remove)
        with suppress(_Reached):
            model(**inputs, use_cache=False)
    # The outermost part that is called: not every class has its `base_model` under the name that it gives.
    for module in outer:
        if isinstance(seen.get(module), dict) and STATES in seen[module]:
            return States(model, module, inputs, seen[module])
    raise UnsupportedModelError(
        f"{type(model).__name__} does not tell its last hidden states, by which a model is healed: leave that out "
        "(--heal-tokens 0)"
    )


def _holds(module: nn.Module, table: nn.Module) -> bool:
    return any(inner is table for inner in module.modules())


def _stop(_module: nn.Module, _args: Any) -> None:
    raise _Reached


class _Reached(Exception):
    """The hidden states are there; the rest of the model is not needed."""
