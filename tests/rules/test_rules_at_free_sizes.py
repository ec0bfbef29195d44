"""Rules bound to traced calls whose sizes are symbols: nothing is refused, and the factors multiply to every dim."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from all_samples import SAMPLES
from sampling import Sample, target_of
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autotp.program import Program, Size
from autotp.rules import call_of, rule_of
from autotp.rules.language import Dim, Part, Rule
from autotp.trace import trace

OPERATORS = sorted(name for name in SAMPLES if name.startswith("aten."))


class Caller(nn.Module):
    """A model that makes one call, its tensors given as inputs."""

    def __init__(self, target: Any, leaves: list[Any], spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.target, self.leaves, self.spec = target, leaves, spec

    def forward(self, *tensors: Tensor) -> Any:
        given = iter(tensors)
        args, kwargs = pytree.tree_unflatten(
            [next(given) if isinstance(x, Tensor) else x for x in self.leaves], self.spec
        )
        result = self.target(*args, **kwargs)
        return list(result) if isinstance(result, (tuple, list)) else result


def traced(name: str, sample: Sample) -> Program:
    kwargs = {key: value for key, value in sample.kwargs.items() if key != "gradient"}
    leaves, spec = pytree.tree_flatten((sample.args, kwargs))
    return trace(Caller(target_of(name), leaves, spec), tuple(leaf for leaf in leaves if isinstance(leaf, Tensor)))


def check(program: Program) -> None:
    values = {symbol: program.nodes[at.node].outputs[0].hint[at.dim] for symbol, at in program.symbols.items()}

    def number(size: Size) -> int:
        return size if isinstance(size, int) else int(size.subs(values))

    def product(dim: Dim, rule: Rule) -> int:
        if isinstance(dim, Part):
            return number(dim.stop) - number(dim.start)
        return int(torch.Size(number(rule.factors[name]) for name in dim).numel())

    for node in program.nodes:
        rule = rule_of(call_of(node, program.type_of)) if node.kind == "op" else None
        if rule is not None:
            tensors = [*map(program.type_of, node.inputs), *node.outputs]
            for tensor, dims in zip(tensors, (*rule.operands, *rule.outputs), strict=True):
                assert tuple(product(dim, rule) for dim in dims) == tensor.hint, (node.op, rule)


@pytest.mark.parametrize("name", OPERATORS)
def test_rule_at_free_sizes(name: str) -> None:
    check(traced(name, SAMPLES[name][0]))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_every_sample_at_free_sizes(name: str) -> None:
    for sample in SAMPLES[name]:
        check(traced(name, sample))
