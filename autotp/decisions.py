"""A plan read back against a program: which strategy every node has, and by which moves every tensor is converted.

Rewriting starts from here, whether the plan was made a moment ago or loaded from a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from autotp.errors import AutotpError
from autotp.layouts import Layout, Move, SortedCut
from autotp.plans import Plan, code_of, layout_of
from autotp.program import Program, Ref
from autotp.strategies import Space, Strategy


@dataclass(frozen=True)
class Recomputed:
    """Tensors that some copies of a repeated block do not keep for backward, but make again there.

    Attributes:
        repeat: number of the repeat in the folding.
        copies: how many copies of the block do so. Where a repeat has several entries, their copies follow each other from the first on.
        versions: (tensor of the first copy, or parameter of it; layout): in the layout in which it is made, its operator runs again, in
            another one the conversion to it does.
    """

    repeat: int
    copies: int
    versions: frozenset[tuple[Ref, Layout]]


@dataclass(frozen=True)
class Decisions:
    """What a plan says about a program.

    Attributes:
        chosen: representative node → its strategy.
        paths: (representative tensor, layout wanted) → the moves from the layout that is made.
        inputs: input node → declared layout; outputs: output position → declared layout (I where not mentioned).
        recomputed: what is not kept for backward.
    """

    chosen: dict[int, Strategy]
    paths: dict[tuple[Ref, Layout], tuple[Move, ...]]
    inputs: dict[int, Layout]
    outputs: dict[int, Layout]
    recomputed: tuple[Recomputed, ...] = ()


def recomputable(space: Space, decisions: Decisions, repeat: int) -> tuple[tuple[Ref, Layout], ...]:
    """Everything that the copies of a repeated block make, of which each may be kept or recomputed, in program order.

    That is what its operators make, and what is converted inside: tensors and the block's own parameters, as its operators want them.
    The orders of sorted rows are left out: all ranks must move rows by the very same one in forward and backward.
    """
    program, folding = space.program, space.folding
    orders = orders_of(decisions)
    found: dict[tuple[Ref, Layout], None] = {}
    block = folding.repeats[repeat].instance(0)
    for index in block:
        strategy = decisions.chosen[index]
        for ref, layout in zip(program.nodes[index].inputs, strategy.operands, strict=True):
            is_own = program.nodes[ref.node].kind not in ("input", "op") and len(folding.members.get(ref.node, ())) > 1
            if (ref.node in block or is_own) and layout != decisions.chosen[ref.node].outputs[ref.output]:
                found[ref, layout] = None
        for output, layout in enumerate(strategy.outputs):
            found[Ref(index, output), layout] = None
    return tuple(version for version in found if version[0].node not in orders)


def orders_of(decisions: Decisions) -> set[int]:
    """The nodes that make the orders of sorted rows."""
    layouts = (layout for strategy in decisions.chosen.values() for layout in (*strategy.operands, *strategy.outputs))
    return {split.cut.order for layout in layouts for split in layout.splits if isinstance(split.cut, SortedCut)}


def read_plan(space: Space, plan: Plan, inputs: dict[int, Layout], outputs: dict[int, Layout]) -> Decisions:
    """Look every decision of `plan` up in `space`.

    Raises:
        AutotpError: the plan was made for another model or mesh, or names a strategy that this program does not have.
    """
    program = space.program
    entries = {entry.node: entry for entry in plan.nodes}
    chosen = {}
    for index in space.folding.members:
        node = program.nodes[index]
        entry = entries.get(node.name)
        if entry is None or entry.copies != len(space.folding.members[index]):
            raise AutotpError(
                f"the plan for {plan.model} does not fit this model: it says nothing about {node.name} ({node.op} in "
                f"{node.path or 'the model itself'}); plan this model again"
            )
        chosen[index] = _strategy(space, index, entry.key, entry.operands, entry.outputs)
    paths = {}
    for conversion in plan.conversions:
        ref = Ref(_node(program, conversion.node, "converts"), conversion.output)
        cuts = space.dim_cuts(ref)
        stations = [layout_of(code, cuts) for code in conversion.layouts]
        moves = []
        for source, target in pairwise(stations):
            moves.append(Move(_moved_axis(source, target, conversion.node), source, target))
        paths[ref, stations[-1]] = tuple(moves)
    return Decisions(chosen, paths, inputs, outputs, _recomputed(space, plan))


def _recomputed(space: Space, plan: Plan) -> tuple[Recomputed, ...]:
    """Entries by tensor, each for the first copies of a block, as sets of tensors for copies that follow each other."""
    program, folding = space.program, space.folding
    entries: dict[int, list[tuple[int, tuple[Ref, Layout]]]] = {}
    for entry in plan.recomputed:
        ref = Ref(_node(program, entry.node, "recomputes"), entry.output)
        users = [ref.node] if program.nodes[ref.node].kind == "op" else [user for user, _ in program.users.get(ref, ())]
        home = next((number for number, repeat in enumerate(folding.repeats) if set(users).intersection(repeat.instance(0))), None)
        if home is None or not 0 <= ref.output < len(program.nodes[ref.node].outputs):
            raise AutotpError(f"the plan recomputes {entry.node!r}, which no repeated block of this model makes: plan this model again")
        entries.setdefault(home, []).append((entry.copies, (ref, layout_of(entry.layout, space.dim_cuts(ref)))))
    found = []
    for home, pairs in sorted(entries.items()):
        before = 0
        for copies in sorted({copies for copies, _ in pairs}):
            found.append(Recomputed(home, copies - before, frozenset(version for least, version in pairs if least >= copies)))
            before = copies
    return tuple(found)


def _moved_axis(source: Layout, target: Layout, name: str) -> int:
    """The mesh axis on which two neighbouring layouts of a path differ."""
    for axis, (before, after) in enumerate(zip(source.kinds, target.kinds, strict=True)):
        if before != after:
            return axis
    for axis in range(len(source.kinds)):
        one, other = source.split_of(axis), target.split_of(axis)
        if one and other and (one.dim != other.dim or (one.cut != other.cut and one.axes == other.axes)):
            return axis
    raise AutotpError(f"the plan converts {name} from ({source}) to ({target}), which is no single move: plan this model again")


def _node(program: Program, name: str, does: str) -> int:
    node = program.by_name.get(name)
    if node is None:
        raise AutotpError(f"the plan {does} a tensor of {name!r}, which this model does not have: plan this model again")
    return node.index


def _strategy(space: Space, index: int, key: tuple[str, ...], operands: tuple[str, ...], outputs: tuple[str, ...]) -> Strategy:
    node = space.program.nodes[index]
    for strategy in space.strategies[index]:
        if strategy.key == key:
            found = tuple(code_of(layout, space.dim_cuts(Ref(index, n))) for n, layout in enumerate(strategy.outputs))
            wanted = tuple(
                code_of(layout, space.dim_cuts(space.tensors[index, False, n][0])) for n, layout in enumerate(strategy.operands)
            )
            if (wanted, found) == (operands, outputs):
                return strategy
    raise AutotpError(
        f"the plan runs {node.name} ({node.op} in {node.path or 'the model itself'}) as {key}, which this program does not offer: "
        "plan this model again"
    )
