"""Exchanges between ranks, and running a conversion's primitives over them: at once, or with one exchange under way meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from autotp import _torch
from autotp.layouts import COLLECTIVES
from autotp.runtime.agreement import exchanging
from autotp.runtime.primitives import AllToAll, Primitive

Steps = tuple[Primitive, ...]


class Comm(Protocol):
    """Exchanges between the ranks of one mesh axis. None of them modifies its input, which must be contiguous.

    Each begins an exchange. The tensor that it returns must not be read, nor the input given up, before `wait` has returned it.
    """

    def all_reduce(self, x: Tensor, axis: int, op: Literal["sum", "max"]) -> Tensor:
        """The sum or the maximum of the ranks' tensors, of the same shape on every rank. `x` may be given up at once."""

    def all_gather(self, x: Tensor, axis: int) -> Tensor:
        """The ranks' tensors, of equal shapes, concatenated along dim 0."""

    def reduce_scatter(self, x: Tensor, axis: int) -> Tensor:
        """The sum of the ranks' tensors, cut into equal chunks along dim 0: this rank's chunk."""

    def all_to_all(
        self, x: Tensor, axis: int, send_sizes: Sequence[int] | None, receive_sizes: Sequence[int] | None
    ) -> Tensor:
        """`x` holds `send_sizes[m]` rows for every rank `m`; the `receive_sizes[m]` rows of every rank are returned.

        None stands for equal sizes.
        """

    def wait(self, x: Tensor) -> Tensor:
        """The same tensor, complete: its exchange has ended, or whatever reads it next on the device comes after it."""


class ProcessComm:
    """Exchanges over the process groups of a `DeviceMesh`, Gloo or NCCL, one group for each axis.

    It uses PyTorch's functional collectives: `torch.compile` traces them, and `CommDebugMode` counts each once.

    Raises:
        AutotpError: from any exchange that fails, because a rank has died, say, or has not come within the groups' timeout.
    """

    def __init__(self, device_mesh: DeviceMesh) -> None:
        self.sizes = tuple(device_mesh.shape)
        groups = [device_mesh.get_group(axis) for axis in range(device_mesh.ndim)]
        self.groups = tuple(group.group_name for group in groups)
        ranks = device_mesh.mesh.flatten().tolist()
        self.ranks = f"the ranks {', '.join(map(str, ranks))}" if len(ranks) <= 16 else f"the {len(ranks)} ranks of {device_mesh}"

    def all_reduce(self, x: Tensor, axis: int, op: Literal["sum", "max"]) -> Tensor:
        return self._plain(_torch.all_reduce, x, op, self.groups[axis])

    def all_gather(self, x: Tensor, axis: int) -> Tensor:
        carried = _carrier(x)
        gathered = self._plain(_torch.all_gather, carried, self.sizes[axis], self.groups[axis])
        return gathered if carried is x else _uncarry(gathered, x.dtype)

    def reduce_scatter(self, x: Tensor, axis: int) -> Tensor:
        return self._plain(_torch.reduce_scatter, x, "sum", self.sizes[axis], self.groups[axis])

    def all_to_all(
        self, x: Tensor, axis: int, send_sizes: Sequence[int] | None, receive_sizes: Sequence[int] | None
    ) -> Tensor:
        if send_sizes is None or receive_sizes is None:
            send_sizes = receive_sizes = [x.shape[0] // self.sizes[axis]] * self.sizes[axis]
        carried = _carrier(x)
        received = self._plain(_torch.all_to_all, carried, list(receive_sizes), list(send_sizes), self.groups[axis])
        return received if carried is x else _uncarry(received, x.dtype)

    def wait(self, x: Tensor) -> Tensor:
        return self._plain(_torch.wait_tensor, x)

    def _plain(self, operator: Callable[..., Any], x: Tensor, *args: Any) -> Tensor:
        """A functional collective, or the wait for it, without autograd, whose part the functions of `collectives` do.

        PyTorch's own autograd layer over these operators is written in Python and costs more than exchanging 32 KB does.
        """
        if torch.compiler.is_compiling():
            result: Tensor = operator(x, *args)
            return result
        with exchanging(self.ranks), _torch.below_autograd():
            result = operator(x, *args)
        return result


def _carrier(x: Tensor) -> Tensor:
    """A view of `x` in a dtype that every backend can move: Gloo moves neither complex numbers nor 8-bit floats."""
    if x.is_complex():
        return torch.view_as_real(x)
    if x.is_floating_point() and x.dtype.itemsize == 1:
        return x.view(torch.uint8)
    return x


def _uncarry(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.view_as_complex(x) if dtype.is_complex else x.view(dtype)


# ---- primitives over exchanges --------------------------------------------------------------------------------------


def run(steps: Steps, x: Tensor, comm: Comm) -> Tensor:
    """The primitives `steps` one after the other on this rank's tensor `x`."""
    for step in steps:
        x = step.prepare(x)
        if step.name in COLLECTIVES:
            received = _begin(step, x, comm)
            x = comm.wait(received)
        x = step.finish(x)
    return x


@dataclass(frozen=True)
class Flight:
    """Primitives that have come as far as an exchange, which is under way: what `finish` needs to end them.

    Attributes:
        received: what the exchange brings; not to be read yet.
        steps: the primitive of the exchange, then those that are still to come; empty if `received` is the result.
        sent: what the exchange still reads, if it does.
    """

    received: Tensor
    steps: Steps = ()
    sent: Tensor | None = None


def start(steps: Steps, x: Tensor, comm: Comm, exchange: Literal["first", "last"]) -> Flight:
    """Run `steps` on `x` up to their first or last exchange, and begin that one; without any, run all.

    A gathered tensor grows from exchange to exchange, a reduced one shrinks: the last of a gather and the first of a reduction
    move the most bytes, and are the ones to have under way while something else is computed.
    """
    left = under_way(steps, exchange)
    x = run(steps[: len(steps) - len(left)], x, comm)
    if not left:
        return Flight(x)
    sent = left[0].prepare(x)
    received = _begin(left[0], sent, comm)
    return Flight(received, left, None if left[0].name in ("all_reduce", "all_reduce_max") else sent)


def under_way(steps: Steps, exchange: Literal["first", "last"]) -> Steps:
    """The primitives from the first or the last exchange on; none if there is no exchange."""
    places = [place for place, step in enumerate(steps) if step.name in COLLECTIVES]
    return steps[places[0 if exchange == "first" else -1] :] if places else ()


def finish(flight: Flight, comm: Comm) -> Tensor:
    """Wait for the exchange, and run what comes after it."""
    if not flight.steps:
        return flight.received
    first, *rest = flight.steps
    return run(tuple(rest), first.finish(comm.wait(flight.received)), comm)


def _begin(step: Primitive, x: Tensor, comm: Comm) -> Tensor:
    """Begin the exchange of a primitive that has one."""
    if step.name == "all_reduce":
        return comm.all_reduce(x, step.axis, "sum")
    if step.name == "all_gather":
        return comm.all_gather(x, step.axis)
    if step.name == "reduce_scatter":
        return comm.reduce_scatter(x, step.axis)
    if step.name == "all_reduce_max":
        return comm.all_reduce(x, step.axis, "max")
    assert isinstance(step, AllToAll)
    return comm.all_to_all(x, step.axis, step.send_sizes, step.receive_sizes)
