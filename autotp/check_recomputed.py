"""Part of the type check: does every entry of `Plan.recomputed` name a tensor that its block makes, and can make again?"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from autotp.fold import Folding
from autotp.layouts import Layout, SortedCut
from autotp.plans import Plan, RecomputePlan
from autotp.program import Program, Ref

Layouts = Mapping[int, tuple[tuple[Layout, ...], tuple[Layout, ...]]]
"""Representative node → the layouts of its operands and of its outputs."""


def recomputed_fault(
    program: Program, folding: Folding, plan: Plan, layouts: Layouts, decode: Callable[[str, Ref, str], Layout]
) -> str | None:
    """What is wrong with the first wrong entry; None if all are right.

    Args:
        layouts: as the plan gives them.
        decode: from a layout code, the tensor, and words for it in errors, to the layout.
    """
    if plan.recomputed and plan.mode != "train":
        return f"the plan is for {plan.mode} and recomputes `{plan.recomputed[0].node}`, but only training keeps tensors for backward"
    orders = {split.cut.order for pair in layouts.values() for side in pair for layout in side for split in layout.splits
              if isinstance(split.cut, SortedCut)}  # fmt: skip
    seen: set[tuple[str, int, str]] = set()
    for entry in plan.recomputed:
        words = f"the plan recomputes `{entry.node}`"
        if (entry.node, entry.output, entry.layout) in seen:
            return f"{words} as {entry.layout} twice, expected one entry"
        seen.add((entry.node, entry.output, entry.layout))
        node = program.by_name.get(entry.node)
        if node is None or not 0 <= entry.output < len(node.outputs):
            return f"{words} (output {entry.output}), which the model lacks"
        if node.index in orders:
            return f"{words}, the order of sorted rows, which must be the very same in forward and backward"
        home = home_of(program, folding, node.index)
        if home is None:
            return f"{words}, which is no tensor of the first copy of a repeated block, the only ones that can be recomputed"
        if not 1 <= entry.copies <= folding.repeats[home].count:
            return f"{words} in {entry.copies} copies, expected 1 to {folding.repeats[home].count}, as many as its block has"
        fault = _layout_fault(program, folding, home, entry, layouts, decode(entry.layout, Ref(node.index, entry.output), words))
        if fault is not None:
            return f"{words} {fault}"
    return None


def home_of(program: Program, folding: Folding, index: int) -> int | None:
    """The repeat whose first copy makes a tensor, or whose own parameter it is; None for all others."""
    if program.nodes[index].kind != "op":
        if len(folding.members.get(index, ())) < 2:
            return None
        index = program.users[Ref(index)][0][0]
    return next((number for number, repeat in enumerate(folding.repeats) if index in repeat.instance(0)), None)


def _layout_fault(program: Program, folding: Folding, home: int, entry: RecomputePlan, layouts: Layouts, layout: Layout) -> str | None:
    """Whether the block makes the tensor in this layout."""
    node, block = program.by_name[entry.node], folding.repeats[home].instance(0)
    made = layouts[node.index][1][entry.output]
    if layout == made:
        return None if node.kind == "op" else f"as ({layout}), as it rests, so that nothing is made"
    ref = Ref(node.index, entry.output)
    inside = [layouts[user][0][place] for user, place in program.users.get(ref, ()) if user in block]
    if layout in inside:
        return None
    known = dict.fromkeys([made, *inside] if node.kind == "op" else [found for found in inside if found != made])
    return f"as ({layout}), which its block does not make; it makes {', '.join(f'({found})' for found in known) or 'no other layout'}"
