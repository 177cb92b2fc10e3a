"""What torch's default dtype is changes nothing in a slim model of transformers'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import cai_runtime.integrations  # noqa: F401  (registers slim checkpoints)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float64"])
def test_logits_do_not_see_the_default_dtype(slim: Path, ids: torch.Tensor, name: str):
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(slim)
        expected = model(ids).logits
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, name))
        try:
            assert torch.equal(model(ids).logits, expected)
            assert torch.equal(AutoModelForCausalLM.from_pretrained(slim, dtype=torch.float32)(ids).logits, expected)
        finally:
            torch.set_default_dtype(before)
