"""What it costs to convert a tensor between layouts, and by which moves: shortest paths over single-axis moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy
from numpy.typing import NDArray

from autotp.layouts import (
    COLLECTIVES,
    Cut,
    Layout,
    Move,
    Place,
    at_sizes,
    local_shape,
    place_on,
    same_pieces,
)
from autotp.price.cluster import Cluster
from autotp.price.communication import Group, collective_seconds, latency_seconds
from autotp.price.compute import memory_seconds
from autotp.price.fusion import Access, accesses
from autotp.price.memory import OPTIMIZERS, Optimizer
from autotp.price.moves import PRIMITIVES, Index, layouts_of, move_graph
from autotp.program import Program, Ref, Size, TensorType


@dataclass(frozen=True)
class Traffic:
    """One primitive that a move runs: its name, mesh axis, and the bytes that `collective_seconds` counts."""

    primitive: str
    axis: int
    bytes: int


def axis_group(mesh: Sequence[int], axis: int) -> Group:
    """The ranks that differ along one mesh axis; the last axis is innermost (neighbouring devices)."""
    stride = 1
    for size in mesh[axis + 1 :]:
        stride *= size
    return Group(mesh[axis], stride, prod(mesh))


Places = Mapping[tuple[TensorType, tuple[tuple[Cut, ...], ...]], tuple[frozenset[Place], ...]]
"""For kinds of tensors, with their candidate cuts: what may be made of them on each mesh axis."""


@dataclass
class ConversionPrices:
    """Prices of conversions on one mesh and cluster, computed once per kind of tensor.

    `symbols` gives the traced value of every symbolic size. With `train`, moves also pay for the gradient's way back. `compiled`:
    operators are priced as `torch.compile` fuses them, not one by one. `places`: what may be made of the tensors that it names on
    each axis, beside I and R; without it, anything.
    """

    cluster: Cluster
    mesh: tuple[int, ...]
    train: bool
    symbols: Mapping[Size, int]
    compiled: bool = False
    optimizer: Optimizer = OPTIMIZERS["adamw"]
    overlap: bool = False
    places: Places = field(default_factory=dict)
    _tables: dict[tuple[TensorType, tuple[tuple[Cut, ...], ...]], PathTable] = field(default_factory=dict)
    _hints: dict[Layout, Layout] = field(default_factory=dict)
    _bytes: dict[tuple[TensorType, Layout], int] = field(default_factory=dict)
    _seconds: dict[Traffic, float] = field(default_factory=dict)
    _accesses: list[tuple[Program, tuple[Access, ...]]] = field(default_factory=list)

    def table(self, tensor: TensorType, cuts: Sequence[tuple[Cut, ...]]) -> PathTable:
        """Cheapest paths between all layouts of a tensor with these candidate cuts."""
        key = (tensor, tuple(cuts))
        if key not in self._tables:
            self._tables[key] = PathTable(self, tensor, cuts)
        return self._tables[key]

    def hint(self, layout: Layout) -> Layout:
        """The layout with every symbolic size replaced by its traced value."""
        if not self.symbols:
            return layout
        if layout not in self._hints:
            self._hints[layout] = at_sizes(layout, self.symbols)
        return self._hints[layout]

    def accesses(self, program: Program) -> tuple[Access, ...]:
        """How every node of the program uses memory, by its index; computed once."""
        if not self._accesses or self._accesses[0][0] is not program:
            self._accesses[:] = [(program, accesses(program, self.compiled))]
        return self._accesses[0][1]

    def breaks_chain(self, program: Program, ref: Ref) -> bool:
        """Whether a collective at this tensor breaks a compiled chain: it stays inside one, and does not reach memory otherwise."""
        return self.compiled and not self.accesses(program)[ref.node].writes[ref.output]

    def broken_seconds(self, program: Program, ref: Ref, table: PathTable, source: Layout, target: Layout) -> float:
        """What it costs that collectives break a compiled chain at a tensor inside it; 0 for a tensor that reaches memory anyway.

        The tensor is written before and read after them, and so is its gradient on the way back. What follows a reduction reads the
        reduction's operand again.
        """
        if not self.breaks_chain(program, ref):
            return 0.0
        tensor, path = program.type_of(ref), table.path(source, target)
        moved: float = self.local_bytes(tensor, source) + self.local_bytes(tensor, target)
        producer = program.nodes[ref.node]
        operand = program.type_of(producer.inputs[0]) if producer.inputs else tensor
        if operand.numel > tensor.numel:
            moved += operand.bytes / prod(size for size, kind in zip(self.mesh, source.kinds, strict=True) if kind in "PMS")
        ways = [any(move.forward in COLLECTIVES for move in path)]
        ways.append(self.train and tensor.requires_grad and any(move.backward in COLLECTIVES for move in path))
        return sum(ways) * memory_seconds(self.cluster, moved)

    def local_bytes(self, tensor: TensorType, layout: Layout) -> int:
        """Bytes that the first rank, which never has less than another, holds."""
        found = self._bytes.get((tensor, layout))
        if found is None:
            shape = local_shape(tensor.hint, self.hint(layout), self.mesh, (0,) * len(self.mesh))
            found = self._bytes[tensor, layout] = tensor.dtype.itemsize * prod(shape)
        return found

    def traffic(self, move: Move, tensor: TensorType) -> tuple[Traffic | None, Traffic | None]:
        """What the move does with the value and with the gradient; None where nothing happens."""
        source, target = self.local_bytes(tensor, move.source), self.local_bytes(tensor, move.target)
        size = max(source, target)
        gradient = self.train and tensor.requires_grad
        forward = Traffic(move.forward, move.axis, size) if move.forward != "none" else None
        backward = Traffic(move.backward, move.axis, size) if gradient and move.backward != "none" else None
        return forward, backward

    def is_idle(self, move: Move) -> bool:
        """Whether the runtime skips a move at the traced sizes, because it leads between two names of the same pieces."""
        return move.kinds == ("S", "S") and same_pieces(self.hint(move.source), self.hint(move.target), self.mesh)

    def seconds(self, traffic: Traffic | None) -> float:
        """Time of one primitive. Local ones (slice, pad, mask) read and write memory."""
        if traffic is None:
            return 0.0
        found = self._seconds.get(traffic)
        if found is None:
            if traffic.primitive in COLLECTIVES:
                kind = "all_reduce" if traffic.primitive == "all_reduce_max" else traffic.primitive
                found = collective_seconds(self.cluster, kind, traffic.bytes, axis_group(self.mesh, traffic.axis))
            else:
                found = memory_seconds(self.cluster, traffic.bytes)
            self._seconds[traffic] = found
        return found

    def move_seconds(self, move: Move, tensor: TensorType) -> tuple[float, float]:
        """Time of one move, forward and backward."""
        forward, backward = self.traffic(move, tensor)
        return self.seconds(forward), self.seconds(backward)

    def forward_seconds(self, path: Sequence[Move], tensor: TensorType) -> float:
        """Time of the forward part of several moves: what it costs to convert a tensor again in backward."""
        moves = [move for move in path if not self.is_idle(move)]
        return sum(self.seconds(self.traffic(move, tensor)[0]) for move in moves)

    def latency(self, axis: int) -> float:
        """The fixed part of an all-reduce over one axis, which a bucket pays once."""
        return latency_seconds(self.cluster, "all_reduce", axis_group(self.mesh, axis))


class PathTable:
    """Shortest conversion paths between the layouts of one tensor."""

    def __init__(self, prices: ConversionPrices, tensor: TensorType, cuts: Sequence[tuple[Cut, ...]]) -> None:
        gradient = prices.train and tensor.requires_grad
        kind = len(prices.mesh), gradient, not tensor.requires_grad
        graph, self.layouts = move_graph(tuple(map(len, cuts)), *kind), layouts_of(cuts, *kind)
        places = prices.places.get((tensor, tuple(cuts)))
        if places is not None:
            allowed = [{*some, ("I", -1, None), ("R", -1, None)} for some in places]
            kept = [all(place_on(found, axis) in some for axis, some in enumerate(allowed)) for found in self.layouts]
            graph, self.layouts = graph.within(numpy.array(kept)), [found for found, keep in zip(self.layouts, kept, strict=True) if keep]
        self.number = {layout: number for number, layout in enumerate(self.layouts)}
        sizes = numpy.array([prices.local_bytes(tensor, layout) for layout in self.layouts])
        sizes = numpy.maximum(sizes[graph.start], sizes[graph.stop])
        forward = _seconds(prices, graph.forward, graph.axis, sizes)
        backward = _seconds(prices, graph.backward, graph.axis, sizes) if gradient else numpy.zeros(len(sizes))
        for move in graph.renaming:
            if prices.is_idle(Move(int(graph.axis[move]), self.layouts[graph.start[move]], self.layouts[graph.stop[move]])):
                forward[move] = backward[move] = 0.0
        count = graph.count
        self.cost = numpy.full((count, count), numpy.inf)
        numpy.fill_diagonal(self.cost, 0.0)
        self._forward = self.cost.copy()
        self.cost[graph.start, graph.stop], self._forward[graph.start, graph.stop] = forward + backward, forward
        self._axis = numpy.zeros((count, count), dtype=numpy.int8)
        self._axis[graph.start, graph.stop] = graph.axis
        self._next = numpy.where(numpy.isfinite(self.cost), numpy.arange(count, dtype=numpy.int32)[None, :], numpy.int32(-1))
        self._relax()

    def _relax(self) -> None:
        """Shortest paths of ever more moves, from every layout to all at once (Bellman–Ford); of equal ones the one with fewer moves.

        A layout has few moves, and a path few of them: a fraction of the work of Floyd–Warshall.
        """
        count = len(self.layouts)
        moves = [numpy.flatnonzero(row[:count] >= 0) for row in self._next]
        onward = [(start, numbers[numbers != start]) for start, numbers in enumerate(moves)]
        steps = [(start, numbers, self.cost[start, numbers], self._forward[start, numbers]) for start, numbers in onward if len(numbers)]
        changed = numpy.ones(count, dtype=bool)
        while changed.any():
            before, before_forward, worth, changed = self.cost.copy(), self._forward.copy(), changed, numpy.zeros(count, dtype=bool)
            for start, numbers, seconds, forward in steps:
                if not worth[numbers].any():
                    continue
                through = seconds[:, None] + before[numbers]
                found = through.min(0)
                better = numpy.flatnonzero(found < before[start] * (1 - 1e-12))
                if len(better):
                    found = found[better]
                    first = (through[:, better] <= found * (1 + 1e-12)).argmax(0)  # of equal ones the first listed
                    self.cost[start, better] = found
                    self._forward[start, better] = forward[first] + before_forward[numbers[first], better]
                    self._next[start, better] = numbers[first]
                    changed[start] = True

    def seconds(self, source: Layout, target: Layout) -> float:
        """Time of the cheapest path; infinite if there is none."""
        return float(self.cost[self.number[source], self.number[target]])

    def between(self, layouts: Sequence[Layout], *, forward: bool = False) -> NDArray[numpy.float64]:
        """Time of the cheapest path from each layout to each; infinite if there is none. With `forward`, its forward part alone."""
        numbers = [self.number[layout] for layout in layouts]
        found: NDArray[numpy.float64] = (self._forward if forward else self.cost)[numpy.ix_(numbers, numbers)]
        return found

    def path(self, source: Layout, target: Layout) -> tuple[Move, ...]:
        """The moves of the cheapest path."""
        at, end = self.number[source], self.number[target]
        moves = []
        while at != end:
            step = int(self._next[at, end])
            moves.append(Move(int(self._axis[at, step]), self.layouts[at], self.layouts[step]))
            at = step
        return tuple(moves)


def _seconds(prices: ConversionPrices, primitive: Index, axis: Index, sizes: Index) -> NDArray[numpy.float64]:
    """Time of the primitives of many moves, of which most are alike."""
    alike, place = numpy.unique(numpy.stack([primitive, axis, sizes]), axis=1, return_inverse=True)
    traffic = (Traffic(PRIMITIVES[name], on, size) if name else None for name, on, size in alike.T.tolist())
    return numpy.array([prices.seconds(one) for one in traffic])[place.reshape(-1)]
