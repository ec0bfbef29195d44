"""Gradients over several backwards, reduced in the last one only.

While reductions are put off, what a conversion makes of a parameter is a leaf of its own: backward ends there, before any exchange,
and its gradient is added up as it is, a partial sum or the gradient of a gathered weight. The next backward that reduces adds these
sums to the gradients that it sends on their way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autotp.errors import AutotpError

Key = tuple[int, int, int]
"""The conversion, the place of the tensor among those that it converts, the tensor."""


@dataclass
class _Sum:
    """A gradient that is not reduced yet; `seen` is the gradient that users saw then, and how often they had changed it."""

    gradient: Tensor
    parameter: Tensor
    seen: tuple[Tensor, int]

    def is_current(self, name: str) -> bool:
        """Whether it still counts: not if the gradients were zeroed since.

        Raises:
            AutotpError: they were changed otherwise.
        """
        now, (before, version) = self.parameter.grad, self.seen
        if now is before and now._version == version:
            return True
        if now is None or not bool((now != 0).any()):
            return False
        raise AutotpError(
            f"the gradient of '{name}' was changed while a part of it is not reduced yet; run the last backward outside of no_sync() first"
        )


class Accumulation:
    """The gradients of one module that wait for their reduction.

    Args:
        parameters: `id` of each tensor that the graph reads → the parameter that users see, and its name.
    """

    def __init__(self, parameters: Mapping[int, tuple[Tensor, str]]) -> None:
        self.parameters = parameters
        self.delaying = self.open = False
        self.sums: dict[Key, _Sum] = {}

    @contextmanager
    def delayed(self) -> Iterator[None]:
        """Put off the reductions of the forwards in this context."""
        before, self.delaying = self.delaying, True
        try:
            yield
        finally:
            self.delaying = before

    def delays(self, x: Tensor) -> bool:
        """Whether the reduction of the gradient of `x` is put off."""
        wanted = self.delaying and x.requires_grad and torch.is_grad_enabled()
        return wanted and id(x) in self.parameters and not torch.compiler.is_compiling()

    def hold(self, key: Key, value: Tensor) -> Tensor:
        """`value`, converted, as a leaf whose gradients are added up."""
        self.open = True
        leaf = value.detach().requires_grad_()

        def add(leaf: Tensor) -> None:
            gradient, leaf.grad = leaf.grad, None
            if gradient is None:
                return
            held = self.take(key)
            parameter = self.parameters[key[2]][0]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            sum_ = gradient if held is None else held.add_(gradient)
            self.sums[key] = _Sum(sum_, parameter, (parameter.grad, parameter.grad._version))

        leaf.register_post_accumulate_grad_hook(add)
        return leaf

    def take(self, key: Key) -> Tensor | None:
        """The sum that waits, which then waits no longer."""
        found = self.sums.pop(key, None)
        return None if found is None or not found.is_current(self.parameters[key[2]][1]) else found.gradient

    def joined(self, key: Key, value: Tensor) -> Tensor:
        """`value`, converted, whose gradient is joined by what waits."""
        if not self.open or key[2] not in self.parameters or not value.requires_grad or torch.compiler.is_compiling():
            return value
        result: Tensor = _Join.apply(value, self, key)
        return result

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Before a step: nothing may wait.

        Raises:
            AutotpError: the last backward was one of those that put off reductions.
        """
        if not self.sums:
            self.open = self.open and self.delaying
            return
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for key in list(self.sums):
            parameter, name = self.parameters[key[2]]
            if id(parameter) in stepped:
                if self.sums[key].is_current(name):
                    raise AutotpError(
                        f"a part of the gradient of '{name}' is not reduced yet; run the last forward and backward before the step outside "
                        "of no_sync()"
                    )
                del self.sums[key]

    def clear(self) -> None:
        """Nothing waits."""
        self.sums.clear()


class _Join(torch.autograd.Function):
    """Nothing forward; adds what waits backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, accumulation: Accumulation, key: Key) -> Tensor:
        ctx.way = accumulation, key
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        accumulation, key = ctx.way
        waiting = accumulation.take(key)
        return gradient if waiting is None else gradient + waiting, None, None
