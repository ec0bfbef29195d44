"""Matrix products."""

from __future__ import annotations

from autotp.rules.language import Call, Rule, bind
from autotp.rules.pattern import ELLIPSIS
from autotp.rules.registry import rule, rule_for

rule("aten.mm.default", "m k, k n -> m n", linear=((0,), (1,)), work="gemm")
rule("aten.bmm.default", "b m k, b k n -> b m n", linear=((0,), (1,)), work="gemm")
rule("aten.mv.default", "m k, k -> m", linear=((0,), (1,)), work="gemm")
rule("aten.dot.default", "k, k -> ", linear=((0,), (1,)), work="gemm")
rule("aten.vdot.default", "k, k -> ", linear=((0,), (1,)), work="gemm")
rule("aten.outer.default", "m, n -> m n", linear=((0,), (1,)))
rule("aten.linalg_matrix_exp.default aten.linalg_matrix_power.default aten.linalg_inv.default", "... m^ m^ -> ... m^ m^")
rule("aten.linalg_cholesky.default", "... m^ m^ -> ... m^ m^")
rule("aten._cdist_forward.default", "... m d^, ... n d^ -> ... m n")


@rule_for("aten.linear.default")
def linear(call: Call) -> Rule:
    """x wᵀ + bias; a vector w leaves no feature dim."""
    if len(call.tensors[1].shape) == 1:
        return bind("... i, i, + -> ...", call, linear=((0, 2), (1, 2)), work="gemm")
    return bind("... i, o i, +o -> ... o", call, linear=((0, 2), (1, 2)), work="gemm")


PRODUCTS = {
    "aten.addmm.default": "m k, k n -> m n",
    "aten.baddbmm.default": "b m k, b k n -> b m n",
    "aten.addbmm.default": "b m k, b k n -> m n",
    "aten.addmv.default": "m k, k -> m",
    "aten.addr.default": "m, n -> m n",
}


@rule_for(" ".join(PRODUCTS))
def bias_and_product(call: Call) -> Rule | None:
    """bias + a @ b; a broadcast bias lacks the factors of its size-1 dims."""
    product = PRODUCTS[call.op]
    if call.op == "aten.addmv.default" and call.tensors[0].shape != call.outputs[0].shape:
        return None  # PyTorch's own result has the bias's shape where a piece is empty
    output = product.partition("-> ")[2].split()
    bias = " ".join(output[len(output) - len(call.tensors[0].shape) :])
    return bind(f"+{bias}, {product}", call, linear=((0, 1), (0, 2)), work="gemm")


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
def einsum(call: Call) -> Rule:
    """The equation is the rule. An index that one operand names twice (a diagonal) stays whole.

    Without an arrow the output has the indices that stand once, in alphabetical order, after those of the ellipsis.
    """
    equation = str(call.args[0]).replace(" ", "")
    left, arrow, right = equation.partition("->")
    if not arrow:
        letters = left.replace(",", "").replace(ELLIPSIS, "")
        right = ELLIPSIS * (ELLIPSIS in left) + "".join(sorted(letter for letter in letters if letters.count(letter) == 1))
    terms = [term.replace(ELLIPSIS, ".") for term in left.split(",")]
    twice = {letter for term in terms for letter in term if term.count(letter) > 1}

    def words(term: str) -> str:
        return " ".join(ELLIPSIS if letter == "." else letter + "^" * (letter in twice) for letter in term)

    pattern = ", ".join(words(term) for term in terms) + " -> " + words(right.replace(ELLIPSIS, "."))
    return bind(pattern, call, linear=tuple((i,) for i in range(len(call.operands))), work="gemm")


@rule_for("aten._trilinear.default")
def trilinear(call: Call) -> Rule:
    """The product of three operands, each without the dims that its list names, summed over some; `bilinear` consists of it."""
    rank = len(call.tensors[0].shape) + len(call.args[3])
    operands = [" ".join(f"d{i}" for i in range(rank) if i not in lacking) for lacking in call.args[3:6]]
    output = " ".join(f"d{i}" for i in range(rank) if i not in call.args[6])
    return bind(f"{', '.join(operands)} -> {output}", call, linear=((0,), (1,), (2,)))


@rule_for("aten.linalg_cross.default")
def cross(call: Call) -> Rule:
    """The dim of the three coordinates stays whole."""
    rank = len(call.outputs[0].shape)
    dim = call.argument(2, "dim", -1) % rank
    dims = " ".join(f"a{i}^" if i == dim else f"d{i}" for i in range(rank))
    return bind(f"{dims}, {dims} -> {dims}", call, linear=((0,), (1,)))
