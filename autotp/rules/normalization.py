"""Normalisations and softmax: the normalised dims are never split."""

from __future__ import annotations

from autotp.rules.language import Call, Rule, bind
from autotp.rules.registry import rule_for


@rule_for("aten.layer_norm.default aten.rms_norm.default")
def layer_norm(call: Call) -> Rule:
    """Over the last dims; weight and bias have just those."""
    dims = " ".join(f"d{i}^" for i in range(len(call.argument(1, "normalized_shape"))))
    operands = ", ".join([f"... {dims}", *[dims] * (len(call.operands) - 1)])
    return bind(f"{operands} -> ... {dims}", call)


@rule_for("aten.group_norm.default")
def group_norm(call: Call) -> Rule:
    """Over groups of channels (dim 1) and all places; rows are free."""
    places = " ".join(f"s{i}^" for i in range(len(call.tensors[0].shape) - 2))
    return bind(f"n c^ {places}, c^, c^ -> n c^ {places}", call)


@rule_for("aten.softmax.int aten._softmax.default aten.log_softmax.int aten._log_softmax.default aten._safe_softmax.default")
def softmax(call: Call) -> Rule:
    """Over one dim."""
    rank = len(call.tensors[0].shape)
    dim = call.argument(1, "dim") % max(rank, 1)
    names = " ".join(f"d{i}^" if i == dim else f"d{i}" for i in range(rank))
    return bind(f"{names} -> {names}", call)
