"""Operators that make tensors from nothing, or shaped like another: every rank makes its piece."""

from __future__ import annotations

from typing import Any

from autotp.rules.language import Call, Local, Rule, bind
from autotp.rules.registry import rule, rule_for

rule(
    "aten.zeros_like.default aten.ones_like.default aten.empty_like.default aten.full_like.default aten.fill.Scalar aten.zero.default",
    "... -> ...",
)

SHAPE = {
    "aten.full.default": 0,
    "aten.zeros.default": 0,
    "aten.ones.default": 0,
    "aten.empty.memory_format": 0,
    "aten.rand.default": 0,
    "aten.randn.default": 0,
    "aten.randint.default": 1,
    "aten.randint.low": 2,
    "aten.normal.float_float": 2,
}
"""Which argument of each operator is the shape."""


def _local_creation(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    place = SHAPE[local.call.op]
    return local.target, (*local.args[:place], local.output_shape(), *local.args[place + 1 :]), local.kwargs


@rule_for(" ".join(SHAPE))
def creation(call: Call) -> Rule:
    """All dims are free."""
    drawn = call.op.split(".")[1] in ("rand", "randn", "randint", "normal")
    shape = " ".join(f"d{i}" for i in range(len(call.outputs[0].shape)))
    return bind(f"-> {shape}", call, local=_local_creation, random=drawn)
