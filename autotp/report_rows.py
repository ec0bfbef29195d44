"""The rows of the report's table: one per distinct module, equal layers folded into `model.layers.0-31`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # these bring torch, which a table of clusters does not need
    from autotp.plans import ConversionPlan, NodePlan, Plan, RecomputePlan

REASONS = {
    "all_reduce": "summed",
    "all_reduce_max": "maximum",
    "all_gather": "gathered",
    "reduce_scatter": "summed",
    "all_to_all": "split anew",
}
WEIGHT_OPS = ("linear", "addmm", "embedding", "mm", "convolution", "conv1d", "conv2d")
"""Operators that always read a weight: without one of its own, the module shares another's."""


@dataclass(frozen=True)
class Row:
    """One line of the table: a module, what its main operator does, and what its results and weights are sent through.

    `traffic` has, per conversion, (collectives forward / backward, why); `seconds` counts all copies and conversions.
    """

    path: str
    copies: int
    operator: str
    strategy: str
    weight: str
    output: str
    traffic: tuple[tuple[str, str], ...]
    seconds: float

    @property
    def content(self) -> tuple[Any, ...]:
        """What must be equal for two rows of the same stack of layers to become one."""
        return self.operator, self.strategy, self.weight, self.output, self.traffic


def rows(plan: Plan) -> list[Row]:
    """One row per distinct module, in the order of the program; equal layers folded into `layers.0-31`."""
    nodes: dict[str, list[NodePlan]] = {}
    weights: dict[str, list[NodePlan]] = {}
    owner: dict[str, str] = {}
    for entry in plan.nodes:
        if entry.op in ("buffer", "constant", "input"):
            continue
        path = entry.path.rpartition(".")[0] if entry.op == "parameter" else entry.path
        (weights if entry.op == "parameter" else nodes).setdefault(path, []).append(entry)
        owner[entry.node] = path
    moved: dict[str, list[ConversionPlan]] = {}
    for conversion in plan.conversions:
        if conversion.node in owner:
            moved.setdefault(owner[conversion.node], []).append(conversion)
    parameters = {entry.node for entries in weights.values() for entry in entries}
    place = {entry.node: number for number, entry in enumerate(plan.nodes)}
    found = [
        _row(plan, path, entries, weights.get(path, []), moved.get(path, []), parameters)
        for path, entries in sorted(nodes.items(), key=lambda item: place[_main(item[1]).node])
    ]
    return fold_rows([row for row in found if _matters(plan, row)], list(plan.strategies))


def recomputed_rows(plan: Plan) -> list[tuple[str, str, str, float, float]]:
    """What backward makes again: (module, tensors, in how many copies, bytes not kept, seconds), in the order of the program.

    A tensor bears the name of its operator; `→` and a layout follow if it is converted again, as a gathered weight is.
    """
    nodes = {entry.node: entry for entry in plan.nodes}
    groups: dict[tuple[str, str], list[RecomputePlan]] = {}
    for tensor in plan.recomputed:
        entry = nodes[tensor.node]
        module = entry.path.rpartition(".")[0] if entry.op == "parameter" else entry.path
        groups.setdefault((re.sub(r"\d+", "*", module, count=1), f"{tensor.copies} of {entry.copies}"), []).append(tensor)
    found: list[tuple[str, str, str, float, float]] = []
    for (module, copies), tensors in groups.items():
        names = []
        for tensor in tensors:
            entry = nodes[tensor.node]
            name = entry.path.rpartition(".")[2] if entry.op == "parameter" else operator_name(entry.op)
            names.append(name if tensor.layout == entry.outputs[tensor.output] else f"{name} → ({tensor.shows})")
        size, seconds = sum(tensor.bytes for tensor in tensors), sum(tensor.seconds for tensor in tensors)
        found.append((module or "(model)", ", ".join(dict.fromkeys(names)), copies, size, seconds))
    return found


def _matters(plan: Plan, row: Row) -> bool:
    return (
        row.path in plan.strategies or any(line for line, _ in row.traffic) or row.seconds >= 0.002 * plan.time.step_s
    )


def _main(nodes: Sequence[NodePlan]) -> NodePlan:
    """The operator that stands for its module: the one that takes the most time, the last of several that take as much."""
    return max(reversed(nodes), key=lambda entry: entry.seconds)


def _row(
    plan: Plan,
    path: str,
    nodes: Sequence[NodePlan],
    weights: Sequence[NodePlan],
    moved: Sequence[ConversionPlan],
    parameters: set[str],
) -> Row:
    main = _main(nodes)
    many = len(plan.mesh) > 1
    lines = [_line(conversion, conversion.node in parameters, many) for conversion in moved]
    traffic = list(dict.fromkeys(line for line in lines if line))
    if not traffic:
        unruled = [entry for entry in nodes if entry.op in plan.replicated]
        reason = "whole on every rank" if main.strategy == "replicate" else "stays local"
        if unruled:
            names = ", ".join(dict.fromkeys(operator_name(entry.op) for entry in unruled))
            reason = f"{names}: no rule, costs {duration(sum(entry.seconds for entry in unruled))}"
        traffic = [("", reason)]
    operator = operator_name(main.op)
    own = next((_layout(entry.shows) for entry in weights if entry.path.endswith("weight")), "")
    own = own or (_layout(weights[0].shows) if weights else "shared" if operator in WEIGHT_OPS else "")
    return Row(
        path=path,
        copies=main.copies,
        operator=operator,
        strategy=plan.strategies.get(path, main.strategy),
        weight=own,
        output=_layout(main.shows),
        traffic=tuple(traffic),
        seconds=sum(entry.seconds for entry in (*nodes, *weights)) + sum(entry.seconds for entry in moved),
    )


def operator_name(name: str) -> str:
    """`linear` for `aten.linear.default`."""
    parts = name.split(".")
    word = parts[1] if len(parts) > 2 and parts[0] == "aten" else parts[-2] if len(parts) > 2 else name
    return {"scaled_dot_product_attention": "attention", "cross_entropy_loss": "cross_entropy"}.get(word, word)


def _line(conversion: ConversionPlan, weight: bool, many: bool) -> tuple[str, str] | None:
    """The collectives of one conversion, forward / backward, and why; None if it is local. Of `many` axes, the one is named."""
    forward, backward = (
        [step for step in steps if step.split(" ")[0] in REASONS] for steps in (conversion.forward, conversion.backward)
    )
    if not forward and not backward:
        return None
    shown = " / ".join(_words(steps) or "–" for steps in (forward, backward))
    axes = ", ".join(dict.fromkeys(step.rpartition(" over ")[2] for step in (*forward, *backward)))
    reason = ", ".join(dict.fromkeys(REASONS[step.split(" ")[0]] for step in forward)) or (
        "grad" if weight else "gradient"
    )
    place = f" over {axes}" if many else ""
    return shown, f"{'weight ' if weight else ''}{reason}: {size(conversion.bytes)}{place}"


def _words(steps: Sequence[str]) -> str:
    """`2× all-gather` for an all-gather over each of two axes."""
    counts = Counter(step.partition(" ")[0].replace("_", "-") for step in steps)
    return " + ".join(f"{count}× {word}" if count > 1 else word for word, count in counts.items())


def _layout(shows: Sequence[str]) -> str:
    """A layout's words; the order of axes that split one dim is left out where it is outer first, as always but rarely."""
    text = shows[0] if shows else ""
    orders = re.findall(r"; (\d+) of \d+", text)
    return re.sub(r"; \d+ of \d+", "", text) if orders == sorted(orders) else text


def fold_rows(found: Sequence[Row], modules: Iterable[str]) -> list[Row]:
    """Put layer ranges in place of layer numbers, and rows of one stack with equal content into one.

    A row stands for `copies` equal layers. Which these are follows from the rows beside it: layers 0 and 1 with 21 copies
    each alternate. Where that does not come out, the row keeps its first layer's name and says `×21`. A row of a layer
    that another row covers already (a few operators of the last layer that differ) is added to that one.
    """
    stacks = _stacks([*modules, *(row.path for row in found)])
    places = {row.path: _place(row, stacks) for row in found}
    families: dict[tuple[str, str], list[Row]] = {}
    for row in found:
        prefix, number, suffix = places[row.path]
        families.setdefault((prefix, suffix) if number >= 0 else (row.path, ""), []).append(row)
    folded: list[Row] = []
    for (prefix, suffix), family in families.items():
        if places[family[0].path][1] < 0:
            folded.extend(_named(row) for row in family)
            continue
        owns = {row.path: places[row.path][1] for row in family}
        folded.extend(_fold_family(family, owns, prefix, suffix, _layers(stacks[prefix], suffix, len(family))))
    return folded


def _fold_family(
    family: Sequence[Row], owns: dict[str, int], prefix: str, suffix: str, members: Sequence[int]
) -> list[Row]:
    """The rows of one module in one stack of layers; `owns` has each row's own layer, `members` all that there are."""
    cover: list[tuple[Row, list[int]]] = []
    loose: list[Row] = []
    for row in sorted(family, key=lambda row: (-row.copies, owns[row.path])):
        taken = {layer for _, held in cover for layer in held}
        others = {owns[other.path] for other in family if other is not row}
        layers = _covered(row, owns[row.path], members, taken | others)
        layers = layers or _covered(row, owns[row.path], members, taken)
        at = next((place for place, (_, held) in enumerate(cover) if owns[row.path] in held), None)
        same = next((place for place, (twin, _) in enumerate(cover) if layers and twin.content == row.content), at)
        if same is not None:
            twin, held = cover[same]
            traffic = tuple(dict.fromkeys(line for part in (twin, row) for line in part.traffic if line[0]))
            twin = replace(twin, seconds=twin.seconds + row.seconds, traffic=traffic or twin.traffic)
            cover[same] = twin, sorted({*held, *layers})
        elif layers:
            cover.append((row, layers))
        else:
            loose.append(_named(row))
    cover.sort(key=lambda entry: entry[1])
    return [*loose, *(replace(row, path=prefix + ranges(layers) + suffix) for row, layers in cover)]


def _named(row: Row) -> Row:
    return replace(row, path=f"{row.path} ×{row.copies}") if row.copies > 1 else row


def _stacks(paths: Iterable[str]) -> dict[str, dict[str, set[int]]]:
    """What stands before a number in a module path → what stands after it → the numbers."""
    found: dict[str, dict[str, set[int]]] = {}
    for path in paths:
        parts = path.split(".")
        for place, part in enumerate(parts):
            if part.isdigit():
                prefix = ".".join([*parts[:place], ""])
                suffix = ".".join(["", *parts[place + 1 :]])
                found.setdefault(prefix, {}).setdefault(suffix, set()).add(int(part))
    return found


def _place(row: Row, stacks: dict[str, dict[str, set[int]]]) -> tuple[str, int, str]:
    """The path around its layer number: the first number of which the model has enough; -1 where there is none."""
    parts = row.path.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            prefix, suffix = ".".join([*parts[:place], ""]), ".".join(["", *parts[place + 1 :]])
            if row.copies == 1 or len(set().union(*stacks[prefix].values())) >= row.copies:
                return prefix, int(part), suffix
    return row.path, -1, ""


def _layers(stack: dict[str, set[int]], suffix: str, rows: int) -> list[int]:
    """The layers that have a module; all layers of the stack if no more are known than have a row (it has no weights)."""
    own = stack.get(suffix, set())
    return sorted(own if len(own) > rows else set().union(*stack.values()))


def _covered(row: Row, first: int, members: Sequence[int], taken: set[int]) -> list[int]:
    """The layers that a row stands for: every n-th from its own on, none of which another row has; [] if none fits."""
    free = [number for number in members if number >= first]
    for step in range(1, len(members) + 1):
        layers = free[::step][: row.copies]
        if len(layers) == row.copies and not taken.intersection(layers):
            return layers
    return []


def ranges(numbers: Sequence[int]) -> str:
    """`0-3` for 0, 1, 2, 3; `0,2…8` for every second; `0-2,5` for others."""
    steps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) > 2 and len(steps) == 1 and (step := steps.pop()) > 1:
        return f"{numbers[0]},{numbers[0] + step}…{numbers[-1]}"
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def size(count: float, like: str = "GiB") -> str:
    """Bytes as people read them, e.g. `64 MiB` or `7.5 GiB`; in decimal units, `7.5 GB`, where the unit that they are `like` is one."""
    unit, value, base, infix = "B", float(count), 1024 if "i" in like else 1000, "i" if "i" in like else ""
    for larger in "KMGT":
        if value < base:
            break
        unit, value = f"{larger if infix else larger.replace('K', 'k')}{infix}B", value / base
    return f"{value:.0f} {unit}" if value >= 100 or value == int(value) else f"{value:.1f} {unit}"


def duration(seconds: float) -> str:
    """Seconds as people read them, e.g. `6.5 ms`."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale or unit == "µs":
            value = seconds / scale
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return "0 s"
