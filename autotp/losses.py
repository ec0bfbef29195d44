"""Cross-entropy in pieces that can be split over rows and over the vocabulary.

    loss of a row = log(sum of exp(logit − max)) + max − (logit of the target)

Clean-up puts these functions in the place of `aten.cross_entropy_loss`; their rules stand in `autotp.rules.loss`. The maximum
carries no gradient (it cancels); the sum and the picked logit are partial where the vocabulary is split.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autotp import _torch


class _SumExp(torch.autograd.Function):
    """Saves the logits only: their exponentials are computed again in backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, maximum: Tensor) -> Tensor:
        ctx.save_for_backward(logits, maximum)
        return (logits - maximum.unsqueeze(-1)).exp_().sum(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, maximum = ctx.saved_tensors
        return (logits - maximum.unsqueeze(-1)).exp_().mul_(gradients[0].unsqueeze(-1)), None


def row_maximum(logits: Tensor) -> Tensor:
    """The largest logit of each row, without gradient. Shapes: (rows, classes) → (rows)."""
    if logits.shape[-1] == 0:
        return logits.new_full(logits.shape[:-1], -torch.inf)
    return logits.detach().amax(-1)


def sum_exp(logits: Tensor, maximum: Tensor) -> Tensor:
    """Per row, the sum of exp(logit − maximum). Shapes: (rows, classes), (rows) → (rows)."""
    return _SumExp.apply(logits, maximum)  # type: ignore[no-any-return]


def pick(logits: Tensor, target: Tensor, start: int = 0, size: int | None = None) -> Tensor:
    """Per row, the logit of the target class, or 0 where it is not among classes [start, start + size)."""
    if logits.shape[-1] == 0:
        return logits.sum(-1)
    index = target - start
    here = (index >= 0) & (index < (logits.shape[-1] if size is None else size))
    picked = logits.gather(-1, index.where(here, 0).unsqueeze(-1)).squeeze(-1)
    return picked * here


def rows_of_loss(sums: Tensor, maximum: Tensor, picked: Tensor, target: Tensor, ignore_index: int, classes: int) -> Tensor:
    """Per row, log(sum) + maximum − picked, or 0 where the target is ignored. All of shape (rows).

    Raises:
        RuntimeError: a target is neither a class nor `ignore_index` (on a GPU when the device is next synchronised).
    """
    valid = ((target >= 0) & (target < classes)) | (target == ignore_index)
    _torch.assert_all(valid, "a target of the cross-entropy is out of bounds")
    return (sums.log() + maximum - picked).where(target != ignore_index, 0)
