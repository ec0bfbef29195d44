"""What is saved for backward, in bytes, and what making it again takes, in seconds: an estimate that is rather low.

Making a tensor again takes its operator, or the conversion to its layout, once more. What that reads must be there: it is saved anyway,
and pays for itself; or nobody saves it, and then it is kept in place of what is made again, or made again too. Each is counted once, at
its least over all layouts, and what is hard to say is left out: of several such operands all but the largest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from autotp.formulate_memory import Tensor, home_of
from autotp.layouts import Layout
from autotp.price.conversion import ConversionPrices
from autotp.price.memory import saved_for
from autotp.price.storage import is_view
from autotp.price.work import Seconds
from autotp.problem import Link, Matrix, Saved
from autotp.program import Ref
from autotp.strategies import Space, Strategy

Index = NDArray[numpy.int64]


def saved_of(
    space: Space,
    prices: ConversionPrices,
    strategies: Mapping[int, Sequence[Strategy]],
    nodes: Sequence[int | None],
    links: Sequence[Link],
    tensors: Sequence[Tensor],
    times: Mapping[int, Sequence[Seconds]],
    *,
    anew: bool,
) -> tuple[Saved, ...]:
    """What operators save for backward, and weights that are gathered.

    Args:
        strategies: of each representative node; nodes: the representative node of each choice, None for outputs.
        times: representative node → the seconds of one copy with each of its strategies.
        anew: whether it may be made again. Under `torch.compile` it may not: the compiler decides that itself.
    """
    program, may = space.program, anew and prices.train and not prices.compiled
    views = {index for index, options in times.items() if is_view(program.nodes[index]) and not any(time.forward for time in options)}
    kept = _saved_tensors(space, views)
    kept_by = [_savers(space, link, tensor.ref, nodes, kept) for link, tensor in zip(links, tensors, strict=True)]
    there = {tensor.ref for tensor, savers in zip(tensors, kept_by, strict=True) if savers}
    for index in sorted(views):
        if program.nodes[index].inputs[0] in there:
            there |= {Ref(index, output) for output in range(len(program.nodes[index].outputs))}
    block = _Block(space, prices, strategies, tensors, times, there) if may else None
    found = []
    for number, (link, tensor, savers) in enumerate(zip(links, tensors, kept_by, strict=True)):
        kind, copies = program.nodes[tensor.ref.node].kind, len(tensor.copies)
        sizes = _sizes(space, prices, tensor)
        if kind == "parameter":
            forward = _forward(space, prices, tensor)
            gathered = (forward > 0) & (sizes[None, :] >= sizes[:, None])  # else it is a part of what is there
            folded = home_of(space, tensor.copies[0]) >= 0
            held = copies if prices.train or not folded else 1  # without backward, one copy's after the other's
            again = forward * copies if folded and may else _never(gathered.shape)
            found.append(Saved(number, tuple(range(1, len(link.consumers) + 1)), gathered * sizes * held, again))
        elif prices.train and tensor.ref.node in views and savers:
            forward = _forward(space, prices, tensor)
            again = forward * copies if may and all(_stays_inside(space, ref) for ref in tensor.copies) else _never(forward.shape)
            found.append(Saved(number, savers, (forward > 0) * sizes * copies, again))  # as it is made, it is its operand's memory
        elif prices.train and kind == "op" and savers:
            if block is None or not all(_stays_inside(space, ref) for ref in tensor.copies):
                size = numpy.broadcast_to(sizes * copies, link.seconds.shape)
                found.append(Saved(number, savers, size, _never(size.shape)))
            else:
                parts = block.parts(link, tensor, savers, sizes)
                found.extend(Saved(number, savers, size * copies, again * copies) for size, again in parts)
    return tuple(found)


def _saved_tensors(space: Space, views: Collection[int]) -> set[tuple[int, int]]:
    """(representative node, operand position; -1 - number for its outputs) of all that is saved; a view is its operand's memory."""
    program, found = space.program, set[tuple[int, int]]()
    for index in space.folding.members:
        node = program.nodes[index]
        if node.kind == "op" and index not in views and any(output.requires_grad for output in node.outputs):
            operands, results = saved_for(node, [program.type_of(ref).requires_grad for ref in node.inputs])
            found |= {(index, place) for place in operands}
            found |= {(index, -1 - place) for place in results if node.outputs[place].requires_grad}
    before = -1
    while before != len(found):  # views of views, and of the copy before
        before = len(found)
        for index in sorted(views, reverse=True):
            outputs = [Ref(index, output) for output in range(len(program.nodes[index].outputs))]
            users = [use for ref in outputs for use in program.users.get(ref, ())]
            if any((space.folding.representative[user], place) in found for user, place in users):
                found.add((index, 0))
    return found


def _savers(
    space: Space, link: Link, ref: Ref, nodes: Sequence[int | None], kept: Collection[tuple[int, int]]
) -> tuple[int, ...]:
    """Which of a link's ends keep its tensor for backward: 0 for the producer, then its consumers."""
    found = [0] if (ref.node, -1 - ref.output) in kept else []
    for place, (choice, _) in enumerate(link.consumers, 1):
        index = nodes[choice]
        if index is not None:
            operands = range(len(space.program.nodes[index].inputs))
            if any((index, operand) in kept and ref in space.tensors[index, False, operand] for operand in operands):
                found.append(place)
    return tuple(found)


# ---- making it again, in one copy of a block ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Read:
    """A tensor that an operator reads and nobody saves.

    Attributes:
        place: operand position; ref: the representative tensor.
        enters: whether it comes from outside the copy, and cannot be made again there.
        share: the part of it that this operator pays for; others that read it pay the rest.
    """

    place: int
    ref: Ref
    enters: bool
    share: float


@dataclass(frozen=True)
class _Support:
    """What must be there for something to be made again: to be kept, in so many bytes, or to be made again, in so many seconds.

    By strategy of the operator that reads, or by layout of the tensor that is made.
    """

    bytes: Matrix
    seconds: Matrix

    def part(self, share: float, rows: Index) -> _Support:
        """A share of it, in other rows."""
        return _Support(share * self.bytes[rows], share * self.seconds[rows])

    def plus(self, other: _Support) -> _Support:
        """Both shares."""
        return _Support(self.bytes + other.bytes, self.seconds + other.seconds)


@dataclass(frozen=True)
class _Call:
    """By strategy: forward seconds, and the largest of its supports."""

    seconds: Matrix
    support: _Support


class _Block:
    """What it takes to run operators of a repeated block again.

    Every tensor that nobody saves has supports, by their root: itself, with the seconds of its operator and of supports that are no
    smaller; or the supports of its operands, where it is no smaller than these, which are then cheaper to keep.
    """

    def __init__(
        self,
        space: Space,
        prices: ConversionPrices,
        strategies: Mapping[int, Sequence[Strategy]],
        tensors: Sequence[Tensor],
        times: Mapping[int, Sequence[Seconds]],
        there: Collection[Ref],
    ) -> None:
        self.space, self.prices, self.strategies, self.there = space, prices, strategies, there
        self.tensors = {tensor.ref: tensor for tensor in tensors if _stays_inside(space, tensor.ref)}
        self.rows = {ref: {layout: row for row, layout in enumerate(tensor.layouts)} for ref, tensor in self.tensors.items()}
        self.supports: dict[Ref, dict[Ref, _Support]] = {}
        self.calls: dict[int, _Call] = {}
        for index in space.folding.members:
            if index in space.folding.places and space.program.nodes[index].kind == "op":
                self._add(index, numpy.array([time.forward for time in times[index]]))

    def _add(self, index: int, seconds: Matrix) -> None:
        outputs, count = len(self.space.program.nodes[index].outputs), len(seconds)
        found: dict[Ref, _Support] = {}
        for read in self._reads(index):
            layouts = [strategy.operands[read.place] for strategy in self.strategies[index]]
            if read.enters:
                held = {read.ref: _Support(read.share * self._bytes(read.ref, layouts), _never((count,)))} if read.share else {}
            else:
                rows = numpy.array([self.rows[read.ref][layout] for layout in layouts])
                held = {root: support.part(read.share, rows) for root, support in self.supports[read.ref].items() if read.share}
            for root, support in held.items():
                found[root] = found[root].plus(support) if root in found else support
        nothing = _Support(numpy.zeros(count), numpy.zeros(count))
        largest = max(found.values(), key=lambda support: float(support.bytes.max()), default=nothing)
        self.calls[index] = _Call(seconds / outputs, _Support(largest.bytes / outputs, largest.seconds / outputs))
        for output in range(outputs):
            tensor = self.tensors.get(Ref(index, output))
            if tensor is not None and tensor.ref not in self.there:
                self.supports[tensor.ref] = self._made(index, tensor, seconds / outputs, found)

    def _made(self, index: int, tensor: Tensor, seconds: Matrix, supports: Mapping[Ref, _Support]) -> dict[Ref, _Support]:
        """The supports of a tensor that nobody saves, by its layouts."""
        made = [strategy.outputs[tensor.ref.output] for strategy in self.strategies[index]]
        own, moving = self._bytes(tensor.ref, made), _forward(self.space, self.prices, tensor)
        whole = seconds + sum((numpy.where(one.bytes >= own, one.seconds, 0.0) for one in supports.values()), numpy.zeros(len(own)))
        again = (self._least(tensor, made, whole)[:, None] + moving).min(0)
        sizes = numpy.where(moving < again, self._least(tensor, made, own)[:, None], numpy.inf).min(0)  # else it is sooner made again
        itself = {tensor.ref: _Support(sizes, again)}
        smaller = sum((one.bytes for one in supports.values()), numpy.zeros(len(own)))
        if not supports or (smaller > own).any() or all(one.seconds.min() <= float(seconds.min()) for one in supports.values()):
            return itself

        def passed(values: Matrix) -> Matrix:
            least: Matrix = numpy.where(numpy.isfinite(moving), self._least(tensor, made, values)[:, None], numpy.inf).min(0)
            return least

        return {root: _Support(passed(one.bytes), passed(one.seconds)) for root, one in supports.items()}

    def _reads(self, index: int) -> list[_Read]:
        """What an operator reads that nobody saves. The second copy says whether it enters: the first may stand behind other layouts."""
        program, folding = self.space.program, self.space.folding
        second = folding.members[index][1]
        copy, found = folding.places[second], []
        for place, real in enumerate(program.nodes[second].inputs):
            ref, home = Ref(folding.representative[real.node], real.output), folding.places.get(real.node)
            inside = home == copy and ref in self.supports
            enters = home is not None and home != copy and home[0] == copy[0]
            if ref in self.there or not (inside or enters):
                continue
            users = {folding.representative[user] for user, _ in program.users[real] if folding.places.get(user) == copy}
            paying = {user for user in users if any(Ref(user, n) in self.there for n in range(len(program.nodes[user].outputs)))} or users
            found.append(_Read(place, ref, enters, 1 / len(paying) if index in paying else 0.0))
        return found

    def _bytes(self, ref: Ref, layouts: Sequence[Layout]) -> Matrix:
        tensor = self.space.program.type_of(ref)
        return numpy.array([float(self.prices.local_bytes(tensor, layout)) for layout in layouts])

    def _least(self, tensor: Tensor, made: Sequence[Layout], values: Matrix) -> Matrix:
        """For every layout of a tensor, the least value of the strategies that make it; infinite where none does."""
        rows = {layout: row for row, layout in enumerate(tensor.layouts)}
        found = numpy.full(len(rows), numpy.inf)
        numpy.minimum.at(found, [rows[layout] for layout in made], values)
        return found

    def parts(self, link: Link, tensor: Tensor, savers: Sequence[int], sizes: Matrix) -> list[tuple[Matrix, Matrix]]:
        """Of the versions of a tensor, the bytes that making them again spares at once, and those for which more must be made again.

        Each with its seconds, of one copy, by (layout made, layout saved). A conversion starts from the tensor as it is made, which is
        taken to be saved by nobody: a tensor saved in that layout too is priced as if it were made twice.
        """
        call, made = self.calls[tensor.ref.node], [tensor.layouts[row] for row in link.made]
        seconds, held, again = (
            self._least(tensor, made, values) for values in (call.seconds, call.support.bytes, call.support.seconds)
        )
        moving, source = _forward(self.space, self.prices, tensor), sizes[:, None]
        again, held, seconds = again[:, None], held[:, None], seconds[:, None]
        if 0 in savers:  # the operator has the tensor as it is made
            own = moving == 0
            return _parts(source, numpy.where(own, seconds, moving), numpy.where(own, held, 0.0), numpy.where(own, again, 0.0))
        rest = numpy.maximum(sizes - source, 0.0)  # what a conversion adds
        with numpy.errstate(invalid="ignore"):
            kept = seconds * rest > moving * source  # dearer per byte than the conversion, so that the source may be kept
        first = numpy.where(kept, moving, moving + seconds)
        second = numpy.where(kept, seconds + numpy.where(held >= source, again, 0.0), again)
        return _parts(sizes, first, numpy.where(kept, source, held), second)


def _parts(size: Matrix, seconds: Matrix, held: Matrix, again: Matrix) -> list[tuple[Matrix, Matrix]]:
    """`seconds` spare all but `held` bytes, `again` more spare these too: both parts, or one where the second is no dearer per byte."""
    size, seconds, held, again = numpy.broadcast_arrays(size, seconds, held, again)
    with numpy.errstate(invalid="ignore"):
        one = (held >= size) | (again * (size - held) <= seconds * held)
        whole = numpy.where(held > 0, seconds + again, seconds)
    first = numpy.where(one, size, size - held), numpy.where(one, whole, seconds)
    second = numpy.where(one, 0.0, held), numpy.where(one, 0.0, again)
    return [first, second] if second[0].any() else [first]


def _sizes(space: Space, prices: ConversionPrices, tensor: Tensor) -> Matrix:
    of = space.program.type_of(tensor.ref)
    return numpy.array([float(prices.local_bytes(of, layout)) for layout in tensor.layouts])


def _forward(space: Space, prices: ConversionPrices, tensor: Tensor) -> Matrix:
    """Forward seconds of the conversions between a tensor's layouts."""
    table = prices.table(space.program.type_of(tensor.ref), space.dim_cuts(tensor.ref))
    return table.between(tensor.layouts, forward=True)


def _never(shape: tuple[int, ...]) -> Matrix:
    return numpy.broadcast_to(numpy.inf, shape)


def _stays_inside(space: Space, ref: Ref) -> bool:
    """Whether a tensor is made and used inside one copy of a repeated block, and nowhere else."""
    places = space.folding.places
    home = places.get(ref.node)
    if home is None or ref in space.program.outgoing:
        return False
    users = {user for user, _ in space.program.users.get(ref, ())}
    return all(places.get(user) == home for user in users) and all(
        _stays_inside(space, Ref(user, output))
        for user in users
        if is_view(space.program.nodes[user])
        for output in range(len(space.program.nodes[user].outputs))
    )
