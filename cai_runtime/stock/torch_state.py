"""Sets torch's process-wide and thread-wide state for our computations, whatever callers and other threads set."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

BUILDING = threading.RLock()  # transformers patches torch for the whole process while it builds or loads a model


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Create this thread's parameters on the meta device. Buffers keep their device.

    Like accelerate's init_empty_weights(include_buffers=False), which however also takes the values of parameters that
    other threads create meanwhile.
    """
    with BUILDING:
        owner, register = threading.get_ident(), nn.Module.register_parameter

        def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            register(module, name, parameter)
            if parameter is not None and threading.get_ident() == owner:
                attributes = {**parameter.__dict__, "requires_grad": parameter.requires_grad}
                module._parameters[name] = type(parameter)(parameter.to("meta"), **attributes)

        nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def plain_torch() -> Iterator[None]:
    """Run with gradients on, inference mode and autocast off, and the CPU as default device, whatever the caller's state.

    Affects this thread only.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
