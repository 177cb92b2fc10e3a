"""Logits from a model's last hidden states, for a few positions at a time.

Logits of all positions would take gigabytes. Applying the head alone is not enough: some models scale or soft-cap the
logits (Gemma 2). So transformers' own forward function runs, with its body patched to return the given states.
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
    """The forward pass of transformers' `model` on `inputs`, up to the head.

    body: the inner model that returns the last hidden states. output: what it returned.
    """

    model: Any
    body: nn.Module
    inputs: Batch
    output: Any

    @property
    def hidden(self) -> torch.Tensor:
        """The last hidden states, [batch, tokens, hidden], with their autograd graph."""
        states: torch.Tensor = self.output[STATES]
        return states

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The logits [n, vocabulary] of any last hidden states [n, hidden]."""
        output = type(self.output)(**{**self.output, STATES: states[None]})
        with patched(self.body, lambda *_args, **_kwargs: output):
            logits: torch.Tensor = self.model(**self.inputs, use_cache=False).logits
        return logits.squeeze(0)  # a view, so that its gradient is one, too


def states_of(model: Any, batch: Batch) -> States:
    """Run a transformers model up to its head, without the batch's "labels".

    Raises UnsupportedModelError when no inner model returns `last_hidden_state`.
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
    # The outermost inner model that was called: `base_model_prefix` is wrong in some classes.
    for module in outer:
        if isinstance(seen.get(module), dict) and STATES in seen[module]:
            return States(model, module, inputs, seen[module])
    raise UnsupportedModelError(
        f"{type(model).__name__} does not return last_hidden_state, which healing needs: turn healing off "
        "(--heal-tokens 0)"
    )


def _holds(module: nn.Module, table: nn.Module) -> bool:
    return any(inner is table for inner in module.modules())


def _stop(_module: nn.Module, _args: Any) -> None:
    raise _Reached


class _Reached(Exception):
    """Ends the forward pass before the head."""
