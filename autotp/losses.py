"""Cross-entropy, NLL and log-sum-exp in pieces that can be split over rows and over the classes.

    log-sum-exp of a row = log(sum of exp(logit − max)) + max
    loss of a row        = log-sum-exp − (logit of the target)

Clean-up (`simplify_losses`) puts these functions in the place of PyTorch's; their rules stand in `autotp.rules.loss`. Classes are
the last dim; all dims before it are rows. The maximum carries no gradient (it cancels); the sum and the picked logit are partial
where the classes are split.
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
    """The largest logit of each row, without gradient. Shapes: (..., classes) → (...)."""
    if logits.shape[-1] == 0:
        return logits.new_full(logits.shape[:-1], -torch.inf)
    return logits.detach().amax(-1)


def sum_exp(logits: Tensor, maximum: Tensor) -> Tensor:
    """Per row, the sum of exp(logit − maximum). Shapes: (..., classes), (...) → (...)."""
    return _SumExp.apply(logits, maximum)  # type: ignore[no-any-return]


def log_of_sum(sums: Tensor, maximum: Tensor) -> Tensor:
    """Per row, log(sum) + maximum; −∞, with gradient 0, where the sum is 0. All of shape (...)."""
    empty = sums == 0
    return (sums.masked_fill(empty, 1).log() + maximum).masked_fill(empty, -torch.inf)


def pick(logits: Tensor, target: Tensor, start: int = 0, size: int | None = None) -> Tensor:
    """Per row, the logit of the target class, or 0 where it is not among classes [start, start + size).

    Shapes: (..., classes), (...) → (...).
    """
    if logits.shape[-1] == 0:
        return logits.sum(-1)
    index = target - start
    here = (index >= 0) & (index < (logits.shape[-1] if size is None else size))
    return logits.gather(-1, index.where(here, 0).unsqueeze(-1)).squeeze(-1).where(here, 0)


def kept_rows(rows: Tensor, target: Tensor, ignore_index: int, classes: int) -> Tensor:
    """The rows, or 0 where the target is ignored. All of shape (...).

    Raises:
        RuntimeError: a target is neither a class nor `ignore_index` (on a GPU when the device is next synchronised).
    """
    valid = ((target >= 0) & (target < classes)) | (target == ignore_index)
    _torch.assert_all(valid, "a target of the cross-entropy is out of bounds")
    return rows.where(target != ignore_index, 0)


def rows_of_loss(sums: Tensor, maximum: Tensor, picked: Tensor, target: Tensor, ignore_index: int, classes: int) -> Tensor:
    """Per row, log(sum) + maximum − picked, or 0 where the target is ignored. All of shape (...).

    Raises:
        RuntimeError: a target is neither a class nor `ignore_index` (on a GPU when the device is next synchronised).
    """
    return kept_rows(sums.log() + maximum - picked, target, ignore_index, classes)


def weight_of_rows(weight: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Per row, the weight of the target class, or 0 where the target is ignored. Shapes: (classes), (...) → (...)."""
    kept = target != ignore_index
    return weight[target.where(kept, 0)].where(kept, 0)


NONE, MEAN, SUM = 0, 1, 2
"""PyTorch's reductions of losses, as its operators number them."""


def share_of_losses(name: str, place: int, count: int, *args: Any) -> Tensor:
    """This rank's share of a mean loss: the sum of its losses, over `count`. 16-bit losses are summed in float32.

    Args:
        name: of the loss, an operator of `aten`.
        place: which of its arguments is the reduction.
        count: how many losses there are on all ranks together.
        args: its arguments; the reduction among them does not matter.
    """
    rows: Tensor = getattr(torch.ops.aten, name).default(*args[:place], NONE, *args[place + 1 :])
    wide = torch.float32 if rows.dtype.itemsize < 4 else rows.dtype
    return (rows.sum(dtype=wide) / count).to(rows.dtype)
