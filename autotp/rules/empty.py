"""Operators that refuse empty tensors, for ranks whose piece is empty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autotp.rules.language import Local


def unless_empty(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A rule's `local` function: the operator with its arguments as they are, skipped where an operand is empty."""
    if not any(layout is not None and layout.splits for layout in local.operands):
        return local.target, local.args, local.kwargs
    shapes = [local.output_shape(index) for index in range(len(local.outputs))]
    dtypes = [output.dtype for output in local.call.outputs]
    return call_unless_empty, (local.target, shapes, dtypes, *local.args), local.kwargs


def call_unless_empty(
    operator: Callable[..., Any],
    shapes: Sequence[Sequence[int]],
    dtypes: Sequence[torch.dtype],
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """operator(*args, **kwargs), or zeros of these shapes if a tensor among the arguments is empty."""
    tensors = [argument for argument in args if isinstance(argument, Tensor)]
    if all(tensor.numel() for tensor in tensors):
        return operator(*args, **kwargs)
    made = tuple(zeros(shape, dtype, tensors) for shape, dtype in zip(shapes, dtypes, strict=True))
    return made if len(made) > 1 else made[0]


def zeros(shape: Sequence[int], dtype: torch.dtype, operands: Sequence[Tensor]) -> Tensor:
    """Zeros of `shape` whose gradient with respect to the operands exists, and is zero."""
    result = operands[0].new_zeros(tuple(shape), dtype=dtype)
    if dtype.is_floating_point or dtype.is_complex:
        for operand in operands:
            if operand.is_floating_point() or operand.is_complex():
                nothing = operand.flatten()[:0].sum()
                result = result + (nothing if dtype.is_complex else nothing.real).to(dtype)
    return result
