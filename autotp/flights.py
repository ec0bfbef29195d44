"""Conversions that begin early, as a walk through a step sees them: four calls from tensors to tensors, for a rank without others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autotp.footprint import Spec
from autotp.runtime.collectives import Bucket, Convert
from autotp.runtime.comm import Flight, finish, start, under_way
from autotp.runtime.prefetch import Reduction

META = torch.device("meta")


@dataclass(frozen=True)
class Journey:
    """A conversion of parameters in parts, like `runtime.prefetch.Prefetched`, whose exchanges bring tensors of the right sizes.

    What is under way is given as the tensors that come in, then, for each, what the exchange still reads (or the same again).

    Args:
        conversion: bound to `Alone`.
        rest: what its forward takes beside tensors.
        operands: the parameters.
    """

    conversion: Convert | Bucket
    rest: tuple[Any, ...]
    operands: tuple[Spec, ...]

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to begin."""
        if isinstance(self.conversion, Convert):
            return not self.conversion.is_idle(self.rest, META)
        return any(self.wants_gradient)

    @property
    def wants_gradient(self) -> tuple[bool, ...]:
        """Which of the parameters get a gradient this way."""
        carries = isinstance(self.conversion, Bucket) or self.conversion.gradient
        return tuple(carries and spec.requires_grad for spec in self.operands)

    def begin(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Ahead of the block before."""
        if isinstance(self.conversion, Bucket):
            return (*tensors, *tensors)
        forward, _ = self.conversion.steps(self.rest, META)
        return _in_and_out([start(forward, tensors[0], self.conversion.comm, "last")])

    def end(self, *received: Tensor) -> tuple[Tensor, ...]:
        """In the block: the converted tensors."""
        if isinstance(self.conversion, Bucket):
            return received
        forward, _ = self.conversion.steps(self.rest, META)
        return (finish(Flight(received[0], under_way(forward, "last")), self.conversion.comm),)

    def begin_back(self, *gradients: Tensor) -> tuple[Tensor, ...]:
        """In the backward of the block."""
        return _in_and_out(self._reduction.begin(gradients))

    def end_back(self, *received: Tensor) -> tuple[Tensor, ...]:
        """After the backward of the block before: the gradients of the parameters that want one."""
        reduction = self._reduction
        left = under_way(reduction.steps, "first")
        return reduction.end([Flight(tensor, left) for tensor in received])

    @property
    def _reduction(self) -> Reduction:
        if isinstance(self.conversion, Bucket):
            return self.conversion.reduction([spec.make() for spec in self.operands])
        return self.conversion.reduction(self.rest, META)


def _in_and_out(flights: Sequence[Flight]) -> tuple[Tensor, ...]:
    received = tuple(flight.received for flight in flights)
    return received + tuple(flight.received if flight.sent is None else flight.sent for flight in flights)


class Alone:
    """`runtime.comm.Comm` for a rank without others: results of the right sizes."""

    def __init__(self, mesh: tuple[int, ...]) -> None:
        self.mesh = mesh

    def all_reduce(self, x: Tensor, axis: int, op: str) -> Tensor:
        """A tensor like `x`."""
        return torch.empty_like(x)

    def all_gather(self, x: Tensor, axis: int) -> Tensor:
        """As many times the rows."""
        return x.new_empty((x.shape[0] * self.mesh[axis], *x.shape[1:]))

    def reduce_scatter(self, x: Tensor, axis: int) -> Tensor:
        """A rank's share of the rows."""
        return x.new_empty((x.shape[0] // self.mesh[axis], *x.shape[1:]))

    def all_to_all(self, x: Tensor, axis: int, send_sizes: Sequence[int] | None, receive_sizes: Sequence[int] | None) -> Tensor:
        """As many rows as are received."""
        return x.new_empty((x.shape[0] if receive_sizes is None else sum(receive_sizes), *x.shape[1:]))

    def wait(self, x: Tensor) -> Tensor:
        """Nothing to wait for."""
        return x
