"""Model FLOPs: the multiply-adds that the mathematics of a model asks for, however it is split."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch

from autotp.program import Node, Program, Size
from autotp.rules import Rule

TRAINING = 3
"""Passes of a product in training: backward does one more for each of its two operands."""


def model_flops(program: Program, rules: Mapping[int, Rule | None], symbols: Mapping[Size, int], train: bool) -> dict[torch.dtype, float]:
    """FLOPs of one step of the whole program, by dtype: two for each multiply-add of products, convolutions and attention.

    Training counts three times the forward pass, and no recomputation (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
    Causal attention counts in full, as there.

    Args:
        rules: node → its rule, for every operator.
        symbols: the value of every symbolic size.
    """
    found: dict[torch.dtype, float] = {}
    for node in program.nodes:
        rule = rules.get(node.index) if node.kind == "op" else None
        flops = forward_flops(program, node, rule, symbols) if rule is not None else 0.0
        if flops:
            output = node.outputs[0]
            passes = TRAINING if train and output.requires_grad else 1
            found[output.dtype] = found.get(output.dtype, 0.0) + passes * flops
    return found


def forward_flops(program: Program, node: Node, rule: Rule, symbols: Mapping[Size, int]) -> float:
    """FLOPs of one operator's forward pass on one device; 0 for what multiplies no matrices."""
    shapes = [program.type_of(ref).hint for ref in node.inputs]
    if len(shapes) < 2:
        return 0.0
    if rule.work == "gemm":
        return 2.0 * prod(size if isinstance(size, int) else int(size.subs(symbols)) for size in rule.factors.values())
    if rule.work == "grouped":  # every row meets the matrix of its key alone
        return 2.0 * prod(shapes[0]) * shapes[1][-1]
    if rule.work == "attention":  # scores, then their product with the values
        q, k, v = shapes[:3]
        return 2.0 * prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
    if rule.work == "convolution":  # every place of the output, or of the input if transposed, meets a whole kernel
        x, weight = shapes[:2]
        places = x if _transposed(node) else node.outputs[0].hint
        return 2.0 * prod(places) * prod(weight[1:])
    return 0.0


def _transposed(node: Node) -> bool:
    return "transpose" in node.op or (node.op == "aten.convolution.default" and bool(node.args[6]))
