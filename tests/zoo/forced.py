"""Plans in which no weight may be gathered and every weight is consumed split wherever a legal strategy exists.

Tiny models are cheapest unsplit, which would test nothing. So the planning problem is changed before it is solved: a weight
that rests split cannot be converted, and every consumer pays for the bytes of a weight that it reads whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

import numpy

from autotp.check import check
from autotp.decisions import Decisions, read_plan
from autotp.describe import describe
from autotp.formulate import Border, Formulation, formulate
from autotp.layouts import Layout
from autotp.planning import Request, prepare, traced_sizes
from autotp.plans import Plan
from autotp.price.cluster import DEFAULT_CLUSTER, load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.problem import Problem
from autotp.program import Node, Program, Ref
from autotp.solve import solve
from autotp.strategies import Space, Strategy
from autotp.verify import cluster_where_splitting_pays

SECONDS_PER_BYTE = 1e-6
TIMES_DEARER = 4
"""A consumer that reads a weight whole pays for its bytes more than any collective costs, and for its own work so many times
what the dearest strategy costs, so that no other split of the work is worth it."""

GAP = 1e-7
"""Relative gap of the solver: weights that no strategy can split make the objective large, and must hide no other."""


SOLVER_SECONDS = 60.0


@dataclass(frozen=True)
class Forced:
    """A plan with splitting forced, checked, and read back for execution."""

    program: Program
    space: Space
    plan: Plan
    decisions: Decisions


def forced_plan(program: Program, ranks: int, model: str) -> tuple[Space, Border, Plan]:
    """Plan `program` on one mesh axis of `ranks` ranks, no weight gathered and as many weight bytes split as can be."""
    request = Request({"tp": ranks})
    space, border = prepare(program, request)
    cluster = cluster_where_splitting_pays(load_cluster(DEFAULT_CLUSTER))
    prices = ConversionPrices(cluster, request.mesh, True, traced_sizes(program))
    formulation = formulate(space, prices, border)
    formulation = replace(formulation, problem=without_gathers(space, formulation))
    solution = solve(formulation.problem, gap=GAP, time_limit=SOLVER_SECONDS)  # any plan must be right, not only the best
    plan = describe(
        space, prices, border, formulation, solution, model=model, mode="train", axes=request.axes, notes=program.notes
    )
    return space, border, plan


def checked(space: Space, border: Border, plan: Plan) -> Forced:
    """The plan after its type check, with its decisions.

    Raises:
        AutotpError: the plan does not pass the check.
    """
    check(space.program, space, plan)
    return Forced(space.program, space, plan, read_plan(space, plan, dict(border.inputs), dict(border.outputs)))


def without_gathers(space: Space, formulation: Formulation) -> Problem:
    """The problem in which split weights stay split, and consumers pay for weights that they read whole."""
    program, problem = space.program, formulation.problem
    weights = weight_tensors(program)
    seconds = [list(choice.seconds) for choice in problem.choices]
    links = list(problem.links)
    for place, stands in enumerate(formulation.tensors):
        if stands.ref not in weights:
            continue
        link, tensor = links[place], program.type_of(stands.ref)
        seconds_left = link.seconds.copy()
        for (source, made), (target, wanted) in product(enumerate(stands.layouts), repeat=2):
            if source != target and not _stays_split(made, wanted, link.seconds[source, target]):
                seconds_left[source, target] = numpy.inf
        links[place] = replace(link, seconds=seconds_left)
        for choice, wanted in link.consumers:
            if formulation.nodes[choice] is None:
                continue
            price = SECONDS_PER_BYTE * tensor.bytes * len(stands.copies) + TIMES_DEARER * max(problem.choices[choice].seconds)
            for strategy, layout in enumerate(wanted):
                if not stands.layouts[layout].splits:
                    seconds[choice][strategy] += price
    return replace(
        problem,
        choices=tuple(replace(choice, seconds=tuple(paid)) for choice, paid in zip(problem.choices, seconds, strict=True)),
        links=tuple(links),
    )


def _stays_split(made: Layout, wanted: Layout, price: float) -> bool:
    """Whether a conversion leaves a split weight where it is (another name of the same pieces), or starts from a whole one."""
    return not made.splits or (bool(wanted.splits) and price == 0)


def weight_tensors(program: Program) -> set[Ref]:
    """Parameters, and what is computed from parameters alone without growing much smaller (a normed, cast or turned weight)."""
    found: dict[Ref, int] = {}
    constant: set[int] = set()
    for node in program.nodes:
        if node.kind == "parameter":
            found[Ref(node.index)] = node.outputs[0].bytes
        elif node.kind in ("buffer", "constant"):
            constant.add(node.index)
        elif node.kind == "op":
            if all(ref.node in constant for ref in node.inputs):
                constant.add(node.index)
            elif all(ref.node in constant or ref in found for ref in node.inputs):
                largest = max(found.get(ref, 0) for ref in node.inputs)
                for output, tensor in enumerate(node.outputs):
                    if 2 * tensor.bytes >= largest:
                        found[Ref(node.index, output)] = largest
    return set(found)


# ---- what a plan does with weights and operators ----------------------------------------------------------------------


@dataclass(frozen=True)
class Shares:
    """How much of a model runs split.

    Attributes:
        operators: share of the operator nodes depending on a parameter whose strategy splits a tensor.
        bytes: share of the parameters' bytes that every consumer reads split.
        whole: (bytes, parameter, operator that reads it whole), the largest first.
        ruleless: operators depending on a parameter that have no rule.
    """

    operators: float
    bytes: float
    whole: tuple[tuple[int, str, str], ...]
    ruleless: tuple[str, ...]


def shares(forced: Forced) -> Shares:
    """Measure a plan on the unfolded program."""
    program, space, chosen = forced.program, forced.space, forced.decisions.chosen
    stands_for, weights = space.folding.representative, weight_tensors(program)
    dependent = set(_dependent(program))
    split = [any(layout.splits for layout in _layouts(chosen[stands_for[n]])) for n in dependent]
    ruleless = sorted({program.nodes[n].op for n in dependent if space.rules[stands_for[n]] is None})
    total = good = 0
    whole: list[tuple[int, str, str]] = []
    for node in program.nodes:
        if node.kind == "parameter" and Ref(node.index) in program.users:
            readers = list(_whole_readers(program, weights, chosen, stands_for, Ref(node.index)))
            total += node.outputs[0].bytes
            good += 0 if readers else node.outputs[0].bytes
            whole += [(node.outputs[0].bytes, str(node.target), readers[0].op)] if readers else []
    largest = tuple(sorted(whole, key=lambda item: (-item[0], item[1])))
    return Shares(sum(split) / len(split) if split else 1.0, good / total if total else 1.0, largest, tuple(ruleless))


def _layouts(strategy: Strategy) -> tuple[Layout, ...]:
    return strategy.operands + strategy.outputs


def _dependent(program: Program) -> Iterator[int]:
    """Operator nodes that depend on a parameter."""
    found = {node.index for node in program.nodes if node.kind == "parameter"}
    for node in program.nodes:
        if node.kind == "op" and any(ref.node in found for ref in node.inputs):
            found.add(node.index)
            yield node.index


def _whole_readers(
    program: Program, weights: set[Ref], chosen: Mapping[int, Strategy], stands_for: Mapping[int, int], ref: Ref
) -> Iterator[Node]:
    """Operators that read a weight, or what is computed from it alone, without splitting it."""
    for user, place in program.users.get(ref, ()):
        node = program.nodes[user]
        if not chosen[stands_for[user]].operands[place].splits:
            yield node
        else:
            for output in range(len(node.outputs)):
                if Ref(user, output) in weights:
                    yield from _whole_readers(program, weights, chosen, stands_for, Ref(user, output))
