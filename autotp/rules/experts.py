"""Mixtures of experts, in the pieces of `autotp.experts`: tokens, experts and features can all be split.

Sorted rows are split by token or by expert; from one to the other leads an all-to-all.
"""

from __future__ import annotations

from typing import Any

from autotp.layouts import SortedCut
from autotp.program import Size
from autotp.rules.language import Call, Dim, Local, LocalElements, LocalStart, Part, Rule, SortedRows
from autotp.rules.registry import rule, rule_for

LocalForm = tuple[Any, tuple[Any, ...], dict[str, Any]]

rule("autotp.experts.sort_by_key", "n^ -> k^ n^")


def _rule(call: Call, sizes: dict[str, Size], operands: list[list[Dim]], output: list[Dim], **options: Any) -> Rule:
    """The rule with these dims; factors of size 1 are left out."""
    factors = {name: size for name, size in sizes.items() if size != 1 or name in ("slot", "expert")}

    def kept(dims: list[Dim]) -> tuple[Dim, ...]:
        return tuple(dim if isinstance(dim, (Part, SortedRows)) else tuple(name for name in dim if name in factors) for dim in dims)

    return Rule(factors, tuple(map(kept, operands)), (kept(output),), **options)


def _features(call: Call) -> dict[str, Size]:
    return {f"d{place}": size for place, size in enumerate(call.tensors[0].shape) if place}


@rule_for("autotp.experts.dispatch")
def _dispatch(call: Call) -> Rule | None:
    _, order, repeat, experts = call.args[:4]
    features = _features(call)
    count = call.outputs[0].shape[0]
    rows = SortedRows("slot", repeat, "expert", count, order.node)
    dims: list[Dim] = [(name,) for name in features]
    sizes = {"slot": call.tensors[0].shape[0], "expert": experts, **features}
    return _rule(call, sizes, [[("slot",), *dims], [(), ()]], [rows, *dims], linear=((0,),), local=_local_dispatch)


def _local_dispatch(local: Local) -> LocalForm:
    rows, held = local.outputs[0].split_at(0), local.operand_split(0, 0)
    more = (None if rows is None else LocalElements(rows), None if held is None else LocalElements(held))
    return local.target, (*local.args[:4], *more), {}


@rule_for("autotp.experts.combine")
def _combine(call: Call) -> Rule | None:
    _, order, experts = call.args[:3]
    features = _features(call)
    count = call.outputs[0].shape[0]
    dims: list[Dim] = [(name,) for name in features]
    rows = SortedRows("slot", 1, "expert", count, order.node)
    sizes = {"slot": count, "expert": experts, **features}
    return _rule(call, sizes, [[rows, *dims], [(), ()]], [("slot",), *dims], linear=((0,),), local=_local_combine)


def _local_combine(local: Local) -> LocalForm:
    split = local.operand_split(0, 0)
    if split is None:
        return local.target, local.args, local.kwargs
    assert isinstance(split.cut, SortedCut)
    return local.target, (*local.args[:3], LocalElements(split), split.cut.by == "key"), {}


@rule_for("autotp.experts.collect")
def _collect(call: Call) -> Rule | None:
    _, order, repeat, experts = call.args[:4]
    features = _features(call)
    dims: list[Dim] = [(name,) for name in features]
    rows = SortedRows("slot", repeat, "expert", call.tensors[0].shape[0], order.node)
    sizes = {"slot": call.outputs[0].shape[0], "expert": experts, **features}
    return _rule(call, sizes, [[rows, *dims], [(), ()]], [("slot",), *dims], linear=((0,),), local=_local_collect)


def _local_collect(local: Local) -> LocalForm:
    rows, held = local.operand_split(0, 0), local.outputs[0].split_at(0)
    if rows is None:
        return local.target, local.args, local.kwargs
    more = (LocalElements(rows), held is None, None if held is None else LocalElements(held))
    return local.target, (*local.args[:4], *more), {}


@rule_for("autotp.experts.grouped_product")
def _grouped_product(call: Call) -> Rule | None:
    order = call.args[2]
    (count, k), (experts, _, n) = call.tensors[0].shape, call.tensors[1].shape
    rows = SortedRows("slot", 1, "expert", count, order.node)
    sizes = {"slot": count, "expert": experts, "k": k, "n": n}
    operands: list[list[Dim]] = [[rows, ("k",)], [("expert",), ("k",), ("n",)], [(), ()]]
    return _rule(
        call, sizes, operands, [rows, ("n",)], special=frozenset({"expert"}), linear=((0,), (1,)), work="grouped", local=_local_product
    )


def _local_product(local: Local) -> LocalForm:
    rows, held = local.operand_split(0, 0), local.operand_split(1, 0)
    start = 0 if held is None else LocalStart(held)
    return local.target, (*local.args[:4], None if rows is None else LocalElements(rows), start), {}
