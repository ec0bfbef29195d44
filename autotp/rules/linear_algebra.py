"""Matrix products."""

from __future__ import annotations

from autotp.rules.language import Call, Rule, bind
from autotp.rules.registry import rule, rule_for

rule("aten.mm.default", "m k, k n -> m n", linear=((0,), (1,)), work="gemm")
rule("aten.bmm.default", "b m k, b k n -> b m n", linear=((0,), (1,)), work="gemm")
rule("aten.mv.default", "m k, k -> m", linear=((0,), (1,)), work="gemm")
rule("aten.dot.default", "k, k -> ", linear=((0,), (1,)), work="gemm")
rule("aten.outer.default", "m, n -> m n", linear=((0,), (1,)))


@rule_for("aten.linear.default")
def linear(call: Call) -> Rule:
    """x wᵀ + bias; a vector w leaves no feature dim."""
    if len(call.tensors[1].shape) == 1:
        return bind("... i, i, + -> ...", call, linear=((0, 2), (1, 2)), work="gemm")
    return bind("... i, o i, +o -> ... o", call, linear=((0, 2), (1, 2)), work="gemm")


@rule_for("aten.addmm.default")
def addmm(call: Call) -> Rule:
    """bias + a @ b; a broadcast bias lacks the factors of its size-1 dims."""
    bias = " ".join(["m", "n"][2 - len(call.tensors[0].shape) :])
    return bind(f"+{bias}, m k, k n -> m n", call, linear=((0, 1), (0, 2)), work="gemm")


@rule_for("aten.baddbmm.default")
def baddbmm(call: Call) -> Rule:
    """bias + a @ b for a batch; a broadcast bias lacks the factors of its size-1 dims."""
    bias = " ".join(["b", "m", "n"][3 - len(call.tensors[0].shape) :])
    return bind(f"+{bias}, b m k, b k n -> b m n", call, linear=((0, 1), (0, 2)), work="gemm")


@rule_for("aten.matmul.default")
def matmul(call: Call) -> Rule:
    """numpy's matmul: vectors, matrices, and batches that broadcast."""
    left, right = (len(tensor.shape) for tensor in call.tensors)
    first = "k" if left == 1 else "... m k"
    second = "k" if right == 1 else "... k n"
    output = " ".join((["..."] if max(left, right) > 2 else []) + ["m"] * (left > 1) + ["n"] * (right > 1))
    if max(left, right) <= 2:
        first, second = first.removeprefix("... "), second.removeprefix("... ")
    return bind(f"{first}, {second} -> {output}", call, linear=((0,), (1,)), work="gemm")


@rule_for("aten.einsum.default")
def einsum(call: Call) -> Rule | None:
    """The equation is the rule, if each operand names each index once."""
    equation = str(call.args[0]).replace(" ", "")
    if "->" not in equation or "." in equation:
        return None
    left, right = equation.split("->")
    if any(len(set(term)) != len(term) for term in left.split(",")):
        return None
    pattern = ", ".join(" ".join(term) for term in left.split(",")) + " -> " + " ".join(right)
    return bind(pattern, call, linear=tuple((i,) for i in range(len(call.operands))), work="gemm")
