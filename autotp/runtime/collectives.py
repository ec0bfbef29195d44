"""The modules that communicate: `Convert` and `Bucket`, over process groups that `bind` gives them.

They are the only places of a sharded graph that communicate, forward or backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index
from typing import Any, Literal, Protocol

import sympy
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from autotp import _torch
from autotp.errors import AutotpError
from autotp.layouts import Coordinate, Move, at_sizes
from autotp.runtime.primitives import AllToAll, Primitive, backward_primitive, forward_primitive
from autotp.runtime.sorted_rows import is_sorted, sorted_primitive

Steps = tuple[Primitive, ...]


class Comm(Protocol):
    """Exchanges between the ranks of one mesh axis. None of them modifies its input, which must be contiguous."""

    def all_reduce(self, x: Tensor, axis: int, op: Literal["sum", "max"]) -> Tensor:
        """The sum or the maximum of the ranks' tensors, of the same shape on every rank."""

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


class ProcessComm:
    """Exchanges over the process groups of a `DeviceMesh`, Gloo or NCCL, one group for each axis.

    It uses PyTorch's functional collectives: `torch.compile` traces them, and `CommDebugMode` counts each once.
    """

    def __init__(self, device_mesh: DeviceMesh) -> None:
        self.sizes = tuple(device_mesh.shape)
        groups = [device_mesh.get_group(axis) for axis in range(device_mesh.ndim)]
        self.groups = tuple(group.group_name for group in groups)

    def all_reduce(self, x: Tensor, axis: int, op: Literal["sum", "max"]) -> Tensor:
        return _exchange(_torch.all_reduce, x, op, self.groups[axis])

    def all_gather(self, x: Tensor, axis: int) -> Tensor:
        carried = _carrier(x)
        gathered = _exchange(_torch.all_gather, carried, self.sizes[axis], self.groups[axis])
        return gathered if carried is x else _uncarry(gathered, x.dtype)

    def reduce_scatter(self, x: Tensor, axis: int) -> Tensor:
        return _exchange(_torch.reduce_scatter, x, "sum", self.sizes[axis], self.groups[axis])

    def all_to_all(
        self, x: Tensor, axis: int, send_sizes: Sequence[int] | None, receive_sizes: Sequence[int] | None
    ) -> Tensor:
        if send_sizes is None or receive_sizes is None:
            send_sizes = receive_sizes = [x.shape[0] // self.sizes[axis]] * self.sizes[axis]
        carried = _carrier(x)
        received = _exchange(_torch.all_to_all, carried, list(receive_sizes), list(send_sizes), self.groups[axis])
        return received if carried is x else _uncarry(received, x.dtype)


def _exchange(collective: Callable[..., Any], x: Tensor, *args: Any) -> Tensor:
    """A functional collective and the wait for it, without autograd, whose part `_Run` and `_Merge` do.

    PyTorch's own autograd layer over these operators is written in Python and costs more than exchanging 32 KB does.
    """
    if torch.compiler.is_compiling():
        received: Tensor = _torch.wait_tensor(collective(x, *args))
        return received
    with _torch.below_autograd():
        received = _torch.wait_tensor(collective(x, *args))
    return received


def _carrier(x: Tensor) -> Tensor:
    """A view of `x` in a dtype that every backend can move: Gloo moves neither complex numbers nor 8-bit floats."""
    if x.is_complex():
        return torch.view_as_real(x)
    if x.is_floating_point() and x.dtype.itemsize == 1:
        return x.view(torch.uint8)
    return x


def _uncarry(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.view_as_complex(x) if dtype.is_complex else x.view(dtype)


def run(steps: Steps, x: Tensor, comm: Comm) -> Tensor:
    """The primitives `steps` one after the other on this rank's tensor `x`."""
    for step in steps:
        x = step.prepare(x)
        if step.name == "all_reduce":
            x = comm.all_reduce(x, step.axis, "sum")
        elif step.name == "all_gather":
            x = comm.all_gather(x, step.axis)
        elif step.name == "reduce_scatter":
            x = comm.reduce_scatter(x, step.axis)
        elif isinstance(step, AllToAll):
            x = comm.all_to_all(x, step.axis, step.send_sizes, step.receive_sizes)
        elif step.name == "all_reduce_max":
            x = comm.all_reduce(x, step.axis, "max")
        x = step.finish(x)
    return x


class _Run(torch.autograd.Function):
    """`run(forward, x)`, whose backward is `run(backward, gradient)`; it can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Steps, backward: Steps, comm: Comm) -> Tensor:
        ctx.way = backward, comm
        return run(forward, x, comm)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        backward, comm = ctx.way
        return run(backward, gradient, comm), None, None, None


def _refuse_second_derivatives() -> None:
    """Called in every backward: what a collective does there is itself not differentiable."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise AutotpError("a parallel module has no second derivatives; call backward() without create_graph=True")


class Convert(nn.Module):
    """Changes the layout of a tensor: `forward(x, *rest)` goes from `path[0].source` to `path[-1].target`, both local.

    `rest` begins with the order of the rows, a tensor, if a layout of the path has sorted rows; then come the `sizes`.

    Args:
        path: the moves, each starting where the one before it ends.
        mesh: size of each mesh axis.
        coordinate: this rank's place on the mesh.
        symbols: the symbolic sizes in the layouts' cuts; `sizes` are their values in the call at hand.
        gradient: whether gradients flow back; if not, the result is a constant to autograd.

    The attribute `comm` is set by `bind`; until then only local moves run.
    """

    comm: Comm

    def __init__(
        self,
        path: tuple[Move, ...],
        mesh: tuple[int, ...],
        coordinate: Coordinate,
        symbols: tuple[sympy.Symbol, ...] = (),
        gradient: bool = True,
    ) -> None:
        super().__init__()
        self.path, self.mesh, self.coordinate = path, mesh, coordinate
        self.symbols, self.gradient = symbols, gradient
        self.comm = _NotBound()
        self.is_sorted = any(is_sorted(layout) for move in path for layout in (move.source, move.target))
        self._cache: dict[tuple[tuple[int, ...], torch.device], tuple[Steps, Steps, bool]] = {}

    def steps(self, rest: tuple[Any, ...], device: torch.device) -> tuple[Steps, Steps]:
        """The primitives of the value and those of its gradient, in the order in which they run, without "none"s."""
        return self._planned(rest, device)[:2]

    def _planned(self, rest: tuple[Any, ...], device: torch.device) -> tuple[Steps, Steps, bool]:
        """`steps`, and whether all of them leave the tensor on this rank as it is."""
        if self.is_sorted:
            return self._planned_for(rest[0], tuple(map(index, rest[1:])), device)
        sizes: tuple[int, ...] = rest
        if torch.compiler.is_compiling():
            sizes = tuple(index(size) for size in sizes)  # a compiled graph holds for these sizes alone
            self._plan(sizes, device)
        elif (sizes, device) not in self._cache:
            self._plan(sizes, device)
        return self._cache[sizes, device]

    def _path_at(self, sizes: tuple[int, ...]) -> list[Move]:
        """The path at these sizes, plain ints."""
        values = dict(zip(self.symbols, sizes, strict=True))
        return [Move(m.axis, at_sizes(m.source, values), at_sizes(m.target, values)) for m in self.path]

    def _planned_for(self, order: Tensor, sizes: tuple[int, ...], device: torch.device) -> tuple[Steps, Steps, bool]:
        """The same where rows are sorted: which rows go where depends on their order, and is found anew in every call."""
        path = self._path_at(sizes)

        def primitive(move: Move, backward: bool) -> Primitive:
            if is_sorted(move.source) or is_sorted(move.target):
                return sorted_primitive(move, backward, self.mesh, self.coordinate, order)
            return (backward_primitive if backward else forward_primitive)(move, self.mesh, self.coordinate, device)

        forward = [primitive(move, False) for move in path]
        backward = [primitive(move, True) for move in reversed(path)] if self.gradient else []
        return _without_none(forward), _without_none(backward), all(step.idle for step in (*forward, *backward))

    def _plan(self, sizes: tuple[int, ...], device: torch.device) -> None:
        """Fill the cache."""
        if (sizes, device) not in self._cache:
            path = self._path_at(sizes)
            forward = [forward_primitive(move, self.mesh, self.coordinate, device) for move in path]
            back = reversed(path) if self.gradient else []
            backward = [backward_primitive(move, self.mesh, self.coordinate, device) for move in back]
            idle = all(step.idle for step in (*forward, *backward))
            self._cache[sizes, device] = _without_none(forward), _without_none(backward), idle

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        """The local tensor in the target layout; `x` is not modified, and itself returned if nothing is to be done."""
        forward, backward, idle = self._planned(rest, x.device)
        if not (x.requires_grad and torch.is_grad_enabled()):
            return run(forward, x, self.comm) if forward else x
        if not self.gradient:
            return run(forward, x.detach(), self.comm)
        if idle:
            return x
        result: Tensor = _Run.apply(x, forward, backward, self.comm)
        return result

    def extra_repr(self) -> str:
        """E.g. `all_gather over axis 0: S(1) → R, backward reduce_scatter`."""
        return "; ".join(_describe(move, self.gradient) for move in self.path)


_torch.constant_when_compiled(Convert._plan)  # its arithmetic is no part of a compiled graph


class Bucket(nn.Module):
    """Merges the gradient reductions of several tensors that go the same way, I → R on each axis of `axis_path`.

    `forward(*tensors)` returns the same `count` tensors as a tuple. Backward, their gradients are flattened into one
    buffer per dtype, which is all-reduced once per move, and split again. Missing gradients count as zeros.
    Raises AutotpError if a move is another one. `comm` is set by `bind`.
    """

    comm: Comm

    def __init__(self, axis_path: tuple[Move, ...], count: int) -> None:
        super().__init__()
        for move in axis_path:
            if move.kinds != ("I", "R"):
                raise AutotpError(
                    f"a bucket merges moves I → R only, not {move.source} → {move.target} on mesh axis {move.axis}; "
                    f"use Convert for the other moves"
                )
        self.axis_path, self.count = axis_path, count
        self.steps = tuple(Primitive("all_reduce", move.axis) for move in reversed(axis_path))
        self.comm = _NotBound()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The same tensors; their gradients are merged."""
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            result: tuple[Tensor, ...] = _Merge.apply(self.steps, self.comm, *tensors)
            return result
        return tensors

    def extra_repr(self) -> str:
        """E.g. `2 tensors, none over axis 0: I → R, backward all_reduce`."""
        return f"{self.count} tensors, " + "; ".join(_describe(move, True) for move in self.axis_path)


class _Merge(torch.autograd.Function):
    """`Bucket`: nothing forward, merged all-reduces backward."""

    @staticmethod
    def forward(ctx: Any, steps: Steps, comm: Comm, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.way = steps, comm
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        steps, comm = ctx.way
        needed = [i for i, need in enumerate(ctx.needs_input_grad[2:]) if need]
        buffers = flatten([gradients[i] for i in needed])
        reduced = unflatten([run(steps, buffer, comm) for buffer in buffers], [gradients[i] for i in needed])
        found: list[Tensor | None] = [None] * len(gradients)
        for i, gradient in zip(needed, reduced, strict=True):
            found[i] = gradient
        return None, None, *found


def flatten(tensors: Sequence[Tensor]) -> list[Tensor]:
    """One flat buffer for each dtype, in order of first appearance; the tensors of that dtype one after the other."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor.reshape(-1))
    return [torch.cat(group) if len(group) > 1 else group[0] for group in groups.values()]


def unflatten(buffers: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `flatten`: the tensors, views of the buffers, with the shapes and dtypes of `like`."""
    dtypes = list(dict.fromkeys(tensor.dtype for tensor in like))
    parts = {}
    for dtype, buffer in zip(dtypes, buffers, strict=True):
        parts[dtype] = iter(buffer.split([tensor.numel() for tensor in like if tensor.dtype == dtype]))
    return [next(parts[tensor.dtype]).view(tensor.shape) for tensor in like]


def bind(module: nn.Module, comm: Comm) -> None:
    """Lets every `Convert` and `Bucket` in `module` communicate through `comm`."""
    for child in module.modules():
        if isinstance(child, (Convert, Bucket)):
            child.comm = comm


class _NotBound:
    """The `comm` of a module that has none yet."""

    def __getattr__(self, name: str) -> Any:  # any exchange
        if name.startswith("_"):
            raise AttributeError(name)
        raise AutotpError(
            f"{name} was called on a module without process groups; call runtime.collectives.bind(module, comm) first"
        )


def _without_none(steps: list[Primitive]) -> Steps:
    return tuple(step for step in steps if step.name != "none")


def _describe(move: Move, gradient: bool) -> str:
    words = f"{move.forward} over axis {move.axis}: {move.source} → {move.target}"
    return words + f", backward {move.backward}" if gradient and move.backward != "none" else words
