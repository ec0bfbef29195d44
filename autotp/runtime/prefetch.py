"""Exchanges for parameters beside computation: gathers begin a block early, reductions of gradients are waited for a block late.

One autograd function is called where the gather begins, ahead of the block before, another in the block, where the gathered tensor is
used. Backward, the second begins the reduction, and the first waits for it: the engine takes, of the functions that are ready, the one
that was called last in the forward, so that the backward of the block between comes first. All gradients are complete when `backward()`
returns, and reach the parameters as any others do: summed over several uses, seen by hooks, accumulated.

What is gathered again in backward (`recompute`) begins a block early too: when the first gradient of the block after it goes on its way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from autotp.errors import AutotpError
from autotp.runtime.comm import Comm, Flight, Steps, finish, start


@dataclass(frozen=True)
class Reduction:
    """How the gradients of converted tensors go back, in two parts.

    Attributes:
        steps, comm: what each exchanged tensor goes through.
        pack: from the gradients of the converted tensors to the tensors that are exchanged.
        unpack: from what has come of these to the gradients of the tensors before the conversion.
    """

    steps: Steps
    comm: Comm
    pack: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    unpack: Callable[[Sequence[Tensor]], Sequence[Tensor]]

    def begin(self, gradients: Sequence[Tensor]) -> list[Flight]:
        """Begin the exchanges."""
        return [start(self.steps, packed, self.comm, "first") for packed in self.pack(gradients)]

    def end(self, flights: Sequence[Flight]) -> tuple[Tensor, ...]:
        """Wait for them; the gradients of the tensors before the conversion."""
        return tuple(self.unpack([finish(flight, self.comm) for flight in flights]))


class Prefetched:
    """Conversions that are under way, for one call of one block.

    Args:
        values: the tensors as far as they are converted.
        reduction: how their gradients go back.
        tensors: those before the conversion that want a gradient, in the order in which `reduction` gives them.
        begin: begins again.
    """

    def __init__(
        self,
        values: tuple[Flight, ...],
        reduction: Reduction,
        tensors: Sequence[Tensor],
        begin: Callable[[], Flight] | None = None,
    ) -> None:
        self._values, self._comm, self._pending, self._begin = values, reduction.comm, _Pending(reduction), begin
        self._token: Tensor | None = _Wait.apply(self._pending, *tensors) if tensors else None

    def take(self) -> tuple[Tensor, ...] | None:
        """The converted tensors; a second time None, so that nothing but their user holds them."""
        if not self._values:
            return None
        found = tuple(finish(value, self._comm) for value in self._values)
        token, self._token, self._values = self._token, None, ()
        if token is None:
            return found
        linked: tuple[Tensor, ...] = _Use.apply(token, self._pending, *found)
        return linked


    def follow(self, before: Sequence[Prefetched | None]) -> None:
        """When gradients begin their way, the conversions of the block before begin again, those that backward makes again.

        Only calls that are to be made again still hold theirs then, so that the others are gone.
        """
        self._pending.before = [weakref.ref(other) for other in reversed(before) if other is not None]

    def begin_again(self) -> None:
        """Begin, if it has not: `take` will give the tensors once more."""
        if not self._values and self._begin is not None:
            self._values = (self._begin(),)


class _Pending:
    """The reductions of one backward between their begin and their end."""

    def __init__(self, reduction: Reduction) -> None:
        self.reduction = reduction
        self.flights: list[Flight] = []
        self.before: list[weakref.ref[Prefetched]] = []

    def begin(self, gradients: Sequence[Tensor]) -> None:
        """Send gradients on their way."""
        self.flights = self.reduction.begin(gradients)
        for reference in self.before:
            other = reference()
            if other is not None:
                other.begin_again()

    def end(self) -> tuple[Tensor, ...]:
        """The gradients; whatever the exchanges needed is given up."""
        flights, self.flights = self.flights, []
        return self.reduction.end(flights)


class _Wait(torch.autograd.Function):
    """Makes a token of parameters. Backward, waits for the gradients that `_Use` has sent on their way."""

    @staticmethod
    def forward(ctx: Any, pending: _Pending, *tensors: Tensor) -> Tensor:
        ctx.pending = pending
        return tensors[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, token: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        return None, *ctx.pending.end()


class _Use(torch.autograd.Function):
    """The converted tensors, tied to the token. Backward, sends their gradients on their way."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, pending: _Pending, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.pending = pending
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        ctx.pending.begin(gradients)
        return gradients[0].new_zeros(()), None, *(None for _ in gradients)


def refuse_second_derivatives() -> None:
    """Called in every backward: what a collective does there is itself not differentiable."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise AutotpError("a parallel module has no second derivatives; call backward() without create_graph=True")


class Conversion(Protocol):
    """A module that converts tensors and can begin to do so early: `Convert` or `Bucket`."""

    def prefetch(self, *args: Any) -> Prefetched | None:
        """Begin; None if there is nothing to exchange."""


class Prefetch(nn.Module):
    """Begins a conversion of the next block's parameters: `forward(*args)` takes what the conversion takes.

    The result is passed to the conversion as `prefetched`. While `torch.compile` traces it is None, and the conversion does everything
    at its place: the compiler orders exchanges itself.
    """

    def __init__(self, conversion: Conversion) -> None:
        super().__init__()
        self.conversion = conversion

    def forward(self, *args: Any, before: Sequence[Prefetched | None] = ()) -> Prefetched | None:
        """The conversion under way; `before` are those of the block before, which may be made again in backward."""
        if torch.compiler.is_compiling():
            return None
        begun = self.conversion.prefetch(*args)
        if begun is not None:
            begun.follow(before)
        return begun
