"""From the solver's choice to the Plan: every decision by name, and its price recomputed on the unfolded graph."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from autotp import kpi
from autotp.formulate import Border, Formulation, outgoing_tensors
from autotp.formulate_memory import home_of, state_bytes
from autotp.layouts import COLLECTIVES, Layout, Move
from autotp.overlap import hidden_seconds
from autotp.plans import ConversionPlan, MemoryUse, NodePlan, Plan, RecomputePlan, Solver, Time, code_of
from autotp.price.again import Again, again
from autotp.price.compute import peak_flops
from autotp.price.conversion import ConversionPrices
from autotp.price.flops import model_flops
from autotp.price.work import Seconds, node_seconds, update_seconds
from autotp.program import Program, Ref
from autotp.recompute import Recomputation
from autotp.solve import Solution
from autotp.strategies import Space, Strategy
from autotp.words import joined, module_strategies, words_of


@dataclass(frozen=True)
class Conversion:
    """A tensor of the program (not only representatives) that is converted, and the moves that do it."""

    ref: Ref
    source: Layout
    target: Layout
    path: tuple[Move, ...]


def fingerprint(program: Program) -> str:
    """A hash of the program's structure without its sizes: the same model traced at another batch size has the same one."""
    digest = hashlib.sha256()
    for node in program.nodes:
        wiring = [(ref.node, ref.output) for ref in node.inputs]
        target = node.target if node.kind != "op" else node.op
        types = [str(output.dtype) + str(len(output.shape)) for output in node.outputs]
        digest.update(repr((node.kind, target, wiring, types)).encode())
    return digest.hexdigest()[:16]


def conversions(space: Space, chosen: Mapping[int, Strategy], border: Border, prices: ConversionPrices) -> list[Conversion]:
    """Every conversion of the whole, unfolded program, in program order: one per tensor and layout wanted."""
    program, stands_for = space.program, space.folding.representative
    outgoing: dict[Ref, list[Layout]] = {}
    real = [value for value in program.outputs if isinstance(value, Ref)]
    for ref, (_, layout) in zip(real, outgoing_tensors(space, border), strict=True):
        outgoing.setdefault(ref, []).append(layout)
    for buffer, ref in program.updated.items():
        outgoing.setdefault(ref, []).append(chosen[stands_for[buffer]].outputs[0])
    found = []
    for ref in sorted({*program.users, *outgoing}, key=lambda ref: (ref.node, ref.output)):
        owner = stands_for[ref.node]
        made = chosen[owner].outputs[ref.output]
        wanted = dict.fromkeys(chosen[stands_for[user]].operands[place] for user, place in program.users.get(ref, ()))
        wanted.update(dict.fromkeys(outgoing.get(ref, ())))
        for layout in wanted:
            if layout != made:
                table = prices.table(program.type_of(ref), space.dim_cuts(Ref(owner, ref.output)))
                found.append(Conversion(ref, made, layout, table.path(made, layout)))
    return found


def bucket_of(space: Space, conversion: Conversion) -> tuple[int, int, tuple[int, ...]] | None:
    """The bucket whose gradient all-reduce this conversion shares: (repeat or -1, copy, axes); None if it has its own."""
    if space.program.nodes[conversion.ref.node].kind != "parameter":
        return None
    if not all(move.kinds == ("I", "R") for move in conversion.path):
        return None
    home = home_of(space, conversion.ref)
    copy = 0
    if home >= 0:
        repeat = space.folding.repeats[home]
        copy = (space.program.users[conversion.ref][0][0] - repeat.start) // repeat.period
    return home, copy, tuple(move.axis for move in conversion.path)


def chosen_of(space: Space, formulation: Formulation, solution: Solution) -> dict[int, Strategy]:
    """Representative node → the strategy that a solution gives it."""
    return {
        node: space.strategies[node][strategy]
        for node, strategy in zip(formulation.nodes, solution.chosen, strict=False)
        if node is not None
    }


def describe(
    space: Space,
    prices: ConversionPrices,
    border: Border,
    formulation: Formulation,
    solution: Solution,
    *,
    model: str,
    mode: str,
    axes: Mapping[str, int],
    declared: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {}),
    notes: tuple[str, ...] = (),
    memory: MemoryUse | None = None,
    recomputation: Recomputation | None = None,
) -> Plan:
    """Name every decision and add up time and collectives over the unfolded program; `memory` is None for the problem's estimate."""
    program, members = space.program, space.folding.members
    chosen = chosen_of(space, formulation, solution)
    found = conversions(space, chosen, border, prices)
    compute, whole, replicated = _compute(space, prices, chosen)
    counts: dict[str, Counter[str]] = {"forward": Counter(), "backward": Counter()}
    communication = 0.0
    buckets: set[tuple[int, int, tuple[int, ...]]] = set()
    folded: dict[tuple[int, int, Layout], list[Conversion]] = {}
    seconds: dict[tuple[int, int, Layout], float] = defaultdict(float)
    exchanges: list[tuple[Ref, float, float]] = []
    for conversion in found:
        key = (space.folding.representative[conversion.ref.node], conversion.ref.output, conversion.target)
        folded.setdefault(key, []).append(conversion)
        bucket = bucket_of(space, conversion)
        price = _price(prices, space, conversion)
        if bucket is not None:
            start = sum(prices.latency(axis) for axis in bucket[2])
            price = max(price - start, 0.0)
            communication += 0.0 if bucket in buckets else start
        communication += price
        seconds[key] += price
        if program.nodes[conversion.ref.node].kind == "parameter":
            forward = min(prices.forward_seconds(conversion.path, program.type_of(conversion.ref)), price)
            exchanges.append((conversion.ref, forward, price - forward))
        for move in (move for move in conversion.path if not prices.is_idle(move)):
            for way, traffic in zip(("forward", "backward"), prices.traffic(move, program.type_of(conversion.ref)), strict=True):
                merged = bucket is not None and bucket in buckets
                if traffic is not None and traffic.primitive in COLLECTIVES and not merged:
                    counts[way]["all_reduce" if traffic.primitive == "all_reduce_max" else traffic.primitive] += 1
        if bucket is not None:
            buckets.add(bucket)
    recomputed, extra = _recomputed(space, prices, chosen, found, recomputation or Recomputation(), counts["backward"])
    own = {node: _node_seconds(space, prices, node, chosen[node]) for node in members} if prices.overlap else {}
    hidden = hidden_seconds(space, own, exchanges) if prices.overlap else 0.0
    step = compute + extra.compute + communication + extra.communication - hidden
    time = Time(step, compute + extra.compute, communication + extra.communication, hidden)
    names = list(axes)
    first = next((n.outputs[0] for n in program.nodes if n.kind == "input"), None)
    inputs = first.hint if first else ()
    of_tokens = first is not None and len(inputs) == 2 and not first.dtype.is_floating_point
    batch, sequence = inputs[0] if inputs else None, inputs[1] if of_tokens else None
    memory = memory or _memory(space, prices, formulation, solution)
    return Plan(
        model=model,
        mode=mode,
        mesh=dict(axes),
        cluster=prices.cluster.name,
        batch=batch,
        sequence=sequence,
        program=fingerprint(program),
        nodes=tuple(_node_plan(space, prices, node, chosen[node]) for node in members),
        conversions=tuple(
            _conversion_plan(space, prices, key, group, names, seconds[key]) for key, group in sorted(folded.items(), key=_order)
        ),
        strategies=module_strategies(space, chosen),
        collectives={way: dict(sorted(kinds.items())) for way, kinds in counts.items()},
        time=time,
        memory=memory,
        solver=Solver(solution.solver, solution.status, solution.gap, solution.elapsed),
        kpi=_kpi(space, prices, time, (whole, compute), memory.total, batch, sequence),
        inputs=dict(declared[0]),
        outputs=dict(declared[1]),
        replicated=replicated,
        notes=(*notes, *_idle_axes(axes, chosen)),
        dynamic=bool(program.symbols),
        recomputed=recomputed,
    )


def _recomputed(
    space: Space,
    prices: ConversionPrices,
    chosen: Mapping[int, Strategy],
    found: Sequence[Conversion],
    recomputation: Recomputation,
    collectives: Counter[str],
) -> tuple[tuple[RecomputePlan, ...], Again]:
    """What is made again, tensor by tensor, and the seconds of it all; what it exchanges is added to `collectives`."""
    program, stands_for = space.program, space.folding.representative
    paths = {(Ref(stands_for[one.ref.node], one.ref.output), one.target): one.path for one in found}
    copies: Counter[tuple[Ref, Layout]] = Counter()
    spared: Counter[tuple[Ref, Layout]] = Counter()
    seconds: dict[tuple[Ref, Layout], float] = defaultdict(float)
    compute = communication = 0.0
    for group, rung in recomputation.groups:
        for _ in range(group.copies):
            ran = set()  # an operator with several results runs once
            for version in sorted(group.versions, key=_place):
                copies[version] += 1
                spared[version] += rung.tensors[version]
                path = paths.get(version, ()) if version[1] != chosen[version[0].node].outputs[version[0].output] else ()
                call = version if path else version[0].node
                if call in ran:
                    continue
                ran.add(call)
                price = again(space, prices, chosen, paths, version)
                seconds[version] += price.total
                compute, communication = compute + price.compute, communication + price.communication
                for move in (move for move in path if not prices.is_idle(move)):
                    traffic = prices.traffic(move, program.type_of(version[0]))[0]
                    if traffic is not None and traffic.primitive in COLLECTIVES:
                        collectives["all_reduce" if traffic.primitive == "all_reduce_max" else traffic.primitive] += 1
    entries = []
    for version in sorted(copies, key=_place):
        (ref, layout), count = version, copies[version]
        code = code_of(layout, space.dim_cuts(ref))
        name = program.nodes[ref.node].name
        entries.append(RecomputePlan(name, ref.output, code, str(layout), count, seconds[version], spared[version]))
    return tuple(entries), Again(compute, communication)


def _place(version: tuple[Ref, Layout]) -> tuple[int, int, str]:
    return version[0].node, version[0].output, str(version[1])


def _kpi(
    space: Space,
    prices: ConversionPrices,
    time: Time,
    work: tuple[float, float],
    held: float,
    batch: int | None,
    sequence: int | None,
) -> dict[str, float]:
    """The key figures of a plan: `work` are the compute seconds of one device alone and of a rank, both without what is made again;
    `held` are peak bytes.
    """
    program, cluster, ranks = space.program, prices.cluster, prod(space.mesh)
    rules = {node.index: space.rules.get(space.folding.representative[node.index]) for node in program.nodes}
    by_peak: dict[float, float] = {}
    for dtype, flops in model_flops(program, rules, prices.symbols, prices.train).items():
        peak = peak_flops(cluster, str(dtype).removeprefix("torch."))
        by_peak[peak] = by_peak.get(peak, 0.0) + flops
    return {
        "communication_to_computation": kpi.communication_to_computation(time.communication_s, time.compute_s),
        "exposed_communication_s": kpi.exposed_communication_s(time.communication_s, time.hidden_s),
        "shard_efficiency": kpi.shard_efficiency(*work, ranks),
        "model_flops_utilisation": kpi.model_flops_utilisation(by_peak, time.step_s, ranks),
        "memory_fraction": kpi.memory_fraction(held, cluster.accelerator.memory_bytes),
        **kpi.rates(batch, sequence, time.step_s),
    }


def _idle_axes(axes: Mapping[str, int], chosen: Mapping[int, Strategy]) -> list[str]:
    """A sentence for every mesh axis on which nothing is split: its devices all do the same."""
    used = {
        axis
        for strategy in chosen.values()
        for layout in (*strategy.operands, *strategy.outputs)
        for axis, kind in enumerate(layout.kinds)
        if kind in "SP"
    }
    return [
        f"mesh axis {name} splits nothing here: with {size} times fewer devices a step takes as long."
        for axis, (name, size) in enumerate(axes.items())
        if axis not in used and size > 1
    ]


def _order(item: tuple[tuple[int, int, Layout], list[Conversion]]) -> tuple[int, int, str]:
    return item[0][0], item[0][1], str(item[0][2])


def _price(prices: ConversionPrices, space: Space, conversion: Conversion) -> float:
    owner = Ref(space.folding.representative[conversion.ref.node], conversion.ref.output)
    table = prices.table(space.program.type_of(owner), space.dim_cuts(owner))
    broken = prices.broken_seconds(space.program, owner, table, conversion.source, conversion.target)
    return table.seconds(conversion.source, conversion.target) + broken


def _compute(space: Space, prices: ConversionPrices, chosen: Mapping[int, Strategy]) -> tuple[float, float, dict[str, float]]:
    """Seconds of all operators and the update on one rank; the same on a single device; and what has no rule, by operator."""
    program = space.program
    total = whole = 0.0
    replicated: dict[str, float] = {}
    memo: dict[int, tuple[float, float]] = {}
    for node in program.nodes:
        owner = space.folding.representative[node.index]
        if owner not in memo:
            first = space.strategies[owner][0]
            memo[owner] = (_node_time(space, prices, owner, chosen[owner]), _node_time(space, prices, owner, first))
        here, alone = memo[owner]
        total += here
        whole += alone
        if node.kind == "op" and space.rules[owner] is None and node.outputs[0].requires_grad:
            replicated[node.op] = replicated.get(node.op, 0.0) + here
    return total, whole, replicated


def _node_seconds(space: Space, prices: ConversionPrices, index: int, strategy: Strategy) -> Seconds:
    node = space.program.nodes[index]
    if node.kind == "op":
        return node_seconds(space.program, node, space.rules[index], strategy, prices)
    if node.kind == "parameter" and prices.train and node.outputs[0].requires_grad:
        return Seconds(0.0, update_seconds(prices, node.outputs[0], strategy.outputs[0]))
    return Seconds(0.0, 0.0)


def _node_time(space: Space, prices: ConversionPrices, index: int, strategy: Strategy) -> float:
    return _node_seconds(space, prices, index, strategy).total


def _node_plan(space: Space, prices: ConversionPrices, index: int, strategy: Strategy) -> NodePlan:
    program = space.program
    node, copies = program.nodes[index], len(space.folding.members[index])
    rule = space.rules.get(index)
    return NodePlan(
        node=node.name,
        op=node.op,
        path=node.path if node.kind == "op" else str(node.target),
        copies=copies,
        key=strategy.key,
        operands=tuple(
            code_of(layout, space.dim_cuts(space.tensors[index, False, place][0])) for place, layout in enumerate(strategy.operands)
        ),
        outputs=tuple(code_of(layout, space.dim_cuts(Ref(index, place))) for place, layout in enumerate(strategy.outputs)),
        shows=tuple(str(layout) for layout in strategy.outputs),
        strategy=joined(words_of(program, node, rule, strategy)),
        seconds=_node_time(space, prices, index, strategy) * copies,
    )


def _conversion_plan(
    space: Space,
    prices: ConversionPrices,
    key: tuple[int, int, Layout],
    group: list[Conversion],
    names: list[str],
    seconds: float,
) -> ConversionPlan:
    owner = Ref(key[0], key[1])
    cuts, tensor = space.dim_cuts(owner), space.program.type_of(owner)
    path = group[0].path
    traffic = [prices.traffic(move, tensor) for move in path]
    stations = [group[0].source, *(move.target for move in path)]

    def words(place: int) -> tuple[str, ...]:
        return tuple(f"{t[place].primitive} over {names[t[place].axis]}" if t[place] else "" for t in traffic)  # type: ignore[union-attr]

    return ConversionPlan(
        node=space.program.nodes[owner.node].name,
        output=owner.output,
        copies=len(group),
        layouts=tuple(code_of(layout, cuts) for layout in stations),
        shows=tuple(str(layout) for layout in stations),
        forward=words(0),
        backward=words(1),
        bytes=tensor.bytes,
        seconds=seconds,
    )


def _memory(space: Space, prices: ConversionPrices, formulation: Formulation, solution: Solution) -> MemoryUse:
    """What the problem estimates as peak bytes per device, by part."""
    program, members, problem = space.program, space.folding.members, formulation.problem
    parts = Counter({"parameters": 0.0, "gradients": 0.0, "optimizer": 0.0})
    for place, node in enumerate(formulation.nodes):
        if node is not None and program.nodes[node].kind in ("parameter", "buffer", "constant"):
            layout = space.strategies[node][solution.chosen[place]].outputs[0]
            for part, size in state_bytes(prices, program.nodes[node], layout).items():
                parts[part] += size * len(members[node])
    transient = max((w[s] for w, s in zip(problem.memory.working, solution.chosen, strict=True)), default=0.0)
    states = sum(parts.values())
    return MemoryUse(parts["parameters"], parts["gradients"], parts["optimizer"], solution.bytes - states - transient, transient)
