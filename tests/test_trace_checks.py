"""Checks of values that only raise do not keep a model from being traced; branches on values do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autotp.errors import AutotpError
from autotp.interpret import run
from autotp.trace import trace


class Checked(nn.Linear):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is not None and labels.max() >= 5:
            raise ValueError("too large")
        if not torch.isfinite(x).all():
            raise ValueError(
                "not finite"
            )
        assert (x > -100).all() and (x < 100).all(), "out of range"
        return super().forward(x) if labels is None else super().forward(x) * labels.unsqueeze(-1)


class Clamping(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if torch.isinf(y).any() or torch.isnan(y).any():
            y = torch.clamp(y, -1e4, 1e4)
        if not torch.isfinite(y).all():
            y = y * 0
        return y


class Branching(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x + 1
        else:
            raise ValueError("negative")
        return super().forward(x)


def test_checks_are_left_out_and_named() -> None:
    torch.manual_seed(0)
    model = Checked(4, 3)
    x, labels = torch.randn(6, 4), torch.randint(5, (6,))
    program = trace(model, (x, labels))
    notes = [note for note in program.notes if "check of values" in note]
    assert len(notes) == 3 and all("test_trace_checks.py" in note for note in notes)
    found, _ = run(program, dict(model.named_parameters()), (x, labels), {})
    assert torch.equal(found, model(x, labels))


def test_values_are_taken_to_be_finite() -> None:
    torch.manual_seed(0)
    model = Clamping(4, 3)
    x = torch.randn(6, 4)
    program = trace(model, (x,))
    assert sum("infinite values" in note for note in program.notes) == 2
    found, _ = run(program, dict(model.named_parameters()), (x,), {})
    assert torch.equal(found, model(x))


def test_a_branch_that_computes_is_refused() -> None:
    with pytest.raises(AutotpError, match="needs the value of a tensor"):
        trace(Branching(4, 3), (torch.randn(6, 4),))
