"""Batch statistics in pieces that can be split over channels, over the batch, and over space.

    variance of a channel = sum of (x − mean)² / count
    normalised            = (x − mean) / √(variance + eps) · weight + bias

Clean-up puts these functions, after a plain mean, in the place of training batch norms (`autotp.simplify_statistics`); their
rules stand in `autotp.rules.normalization`. The count is that of the whole batch, so a mean and a variance of a piece are summands.
Channels are dim 1, and (channels) stands for a vector of one number per channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Variance(torch.autograd.Function):
    """Saves x and the mean only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(x, mean)
        ctx.count = count
        squares = (x - per_channel(mean, x)).square_()
        return squares.sum([dim for dim in range(x.dim()) if dim != 1]) / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, mean = ctx.saved_tensors
        scale = per_channel(gradients[0] * (2 / ctx.count), x)
        return ((x - per_channel(mean, x)).mul_(scale)).to(x.dtype), None, None


class _Normalize(torch.autograd.Function):
    """PyTorch's batch norm of given statistics, with a gradient for these."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, mean, variance, weight)
        ctx.eps = eps
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (x, mean, variance, weight, bias)]
        if x.numel() == 0:
            return torch.empty_like(x)
        scale, shift = (None if tensor is None else tensor.to(mean.dtype) for tensor in (weight, bias))
        return torch.batch_norm(x, scale, shift, mean, variance, False, 0.0, eps, False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, variance, weight = ctx.saved_tensors
        others = [dim for dim in range(x.dim()) if dim != 1]
        wide, dtypes = _at_least_float32(mean.dtype), ctx.dtypes
        mean, rstd = mean.to(wide), (variance.to(wide) + ctx.eps).rsqrt()
        slope = rstd if weight is None else rstd * weight.to(wide)
        of_x = gradients[0] * per_channel(slope, x)
        of_bias = gradients[0].sum(others, dtype=wide)
        of_weight = ((x - per_channel(mean, x)).mul_(gradients[0])).sum(others) * rstd
        found = (of_x, -of_bias * slope, of_weight * slope * rstd * -0.5, of_weight, of_bias)
        return *(None if dtype is None else made.to(dtype) for made, dtype in zip(found, dtypes, strict=True)), None


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def variance(x: Tensor, mean: Tensor, count: int) -> Tensor:
    """Per channel, the sum of (x − mean)², divided by `count`: the (biased) variance if x is all of `count` elements.

    The mean gets no gradient: its gradients cancel over all elements, whose deviations from their mean sum to zero.
    Shapes: (rows, channels, ...), (channels) → (channels), in the mean's dtype.
    """
    return _Variance.apply(x, mean, count)  # type: ignore[no-any-return]


def normalize(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """(x − mean) / √(variance + eps) · weight + bias. Shapes: (rows, channels, ...), then (channels) each → that of x."""
    return _Normalize.apply(x, mean, variance, weight, bias, eps)  # type: ignore[no-any-return]


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(channels) as a shape that broadcasts over x."""
    return values.view(1, -1, *[1] * (x.dim() - 2))
