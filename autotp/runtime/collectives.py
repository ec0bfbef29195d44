"""The modules that communicate: `Convert` and `Bucket`, over process groups that `bind` gives them.

They are the only places of a sharded graph that communicate, forward or backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import index
from typing import Any

import sympy
import torch
from torch import Tensor, nn

from autotp import _torch
from autotp.errors import AutotpError
from autotp.layouts import COLLECTIVES, Coordinate, Move, at_sizes
from autotp.runtime.accumulation import Accumulation
from autotp.runtime.comm import Comm, Flight, Steps, run, start
from autotp.runtime.prefetch import Prefetched, Reduction, refuse_second_derivatives
from autotp.runtime.primitives import Primitive, backward_primitive, forward_primitive
from autotp.runtime.sorted_rows import is_sorted, sorted_primitive


class _Run(torch.autograd.Function):
    """`run(forward, x)`, whose backward is `run(backward, gradient)`; it can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Steps, backward: Steps, comm: Comm) -> Tensor:
        ctx.way = backward, comm
        return run(forward, x, comm)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        backward, comm = ctx.way
        return run(backward, gradient, comm), None, None, None


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
    accumulation: Accumulation | None = None

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

    def is_idle(self, rest: tuple[Any, ...], device: torch.device) -> bool:
        """Whether the tensor, and its gradient, stay on this rank as they are."""
        return self._planned(rest, device)[2]

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

    def reduction(self, rest: tuple[Any, ...], device: torch.device) -> Reduction:
        """How the gradient goes back, in two parts."""
        return Reduction(self._planned(rest, device)[1], self.comm, tuple, tuple)

    def prefetch(self, x: Tensor, *rest: Any) -> Prefetched | None:
        """Begin the conversion; what comes back is passed to `forward` as `prefetched`. None if there is nothing to do."""
        forward, _, idle = self._planned(rest, x.device)
        if idle:
            return None
        wanted = [x] if self.gradient and x.requires_grad and torch.is_grad_enabled() and not self._delays(x, rest) else []
        begin = partial(start, forward, x.detach(), self.comm, "last")
        return Prefetched((begin(),), self.reduction(rest, x.device), wanted, begin)

    def forward(self, x: Tensor, *rest: Any, prefetched: Prefetched | None = None) -> Tensor:
        """The local tensor in the target layout; `x` is not modified, and itself returned if nothing is to be done."""
        if self.accumulation is not None and self._delays(x, rest):
            return self.accumulation.hold((id(self), 0, id(x)), self._converted(x.detach(), rest, prefetched))
        result = self._converted(x, rest, prefetched)
        return result if self.accumulation is None else self.accumulation.joined((id(self), 0, id(x)), result)

    def _delays(self, x: Tensor, rest: tuple[Any, ...]) -> bool:
        """Whether the exchanges for the gradient of `x` are put off."""
        if self.accumulation is None or not self.gradient or not self.accumulation.delays(x):
            return False
        return any(step.name in COLLECTIVES for step in self._planned(rest, x.device)[1])

    def _converted(self, x: Tensor, rest: tuple[Any, ...], prefetched: Prefetched | None) -> Tensor:
        taken = None if prefetched is None else prefetched.take()
        if taken is not None:
            return taken[0]
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
    accumulation: Accumulation | None = None

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

    def reduction(self, tensors: Sequence[Tensor]) -> Reduction:
        """How the gradients of these tensors go back, in two parts; those that want none have none."""
        needed = [place for place, tensor in enumerate(tensors) if tensor.requires_grad]
        like = [tensors[place].detach() for place in needed]

        def pack(gradients: Sequence[Tensor]) -> list[Tensor]:
            return flatten([gradients[place] for place in needed])

        return Reduction(self.steps, self.comm, pack, lambda buffers: unflatten(buffers, like))

    def prefetch(self, *tensors: Tensor) -> Prefetched | None:
        """Begin; what comes back is passed to `forward` as `prefetched`. None if no tensor wants a gradient."""
        wanted = [tensor for tensor in tensors if tensor.requires_grad and torch.is_grad_enabled()]
        if not wanted or (self.accumulation is not None and self.accumulation.delays(wanted[0])):
            return None
        values = tuple(Flight(tensor.detach()) for tensor in tensors)
        return Prefetched(values, self.reduction(tensors), wanted)

    def forward(self, *tensors: Tensor, prefetched: Prefetched | None = None) -> tuple[Tensor, ...]:
        """The same tensors; their gradients are merged."""
        waiting = self.accumulation
        if waiting is None or not (waiting.delaying or waiting.open):
            return self._merged(tensors, prefetched)
        keys = [(id(self), place, id(tensor)) for place, tensor in enumerate(tensors)]
        if any(waiting.delays(tensor) for tensor in tensors):
            return tuple(waiting.hold(key, x) if waiting.delays(x) else x for key, x in zip(keys, tensors, strict=True))
        merged = self._merged(tensors, prefetched)
        return tuple(waiting.joined(key, x) for key, x in zip(keys, merged, strict=True))

    def _merged(self, tensors: tuple[Tensor, ...], prefetched: Prefetched | None) -> tuple[Tensor, ...]:
        taken = None if prefetched is None else prefetched.take()
        if taken is not None:
            return taken
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
        refuse_second_derivatives()
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


def bind(module: nn.Module, comm: Comm, accumulation: Accumulation | None = None) -> None:
    """Lets every `Convert` and `Bucket` in `module` communicate through `comm`; `accumulation` may put off reductions."""
    for child in module.modules():
        if isinstance(child, (Convert, Bucket)):
            child.comm, child.accumulation = comm, accumulation


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
