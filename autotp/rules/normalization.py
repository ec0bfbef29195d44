"""Normalisations and softmax: the normalised dims are never split."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autotp.rules.empty import unless_empty, zeros
from autotp.rules.language import Call, Local, Rule, bind, exact_quotient
from autotp.rules.registry import rule_for


@rule_for("aten.layer_norm.default aten.rms_norm.default")
def layer_norm(call: Call) -> Rule:
    """Over the last dims; weight and bias have just those."""
    dims = " ".join(f"d{i}^" for i in range(len(call.argument(1, "normalized_shape"))))
    operands = ", ".join([f"... {dims}", *[dims] * (len(call.operands) - 1)])
    return bind(f"{operands} -> ... {dims}", call)


@rule_for("aten._fused_rms_norm.default aten.native_layer_norm.default")
def norm_with_statistics(call: Call) -> Rule:
    """As above, but the statistics of every row are results too."""
    dims = " ".join(f"d{i}^" for i in range(len(call.argument(1, "normalized_shape"))))
    ones = " ".join("1" for _ in dims.split())
    operands = ", ".join([f"... {dims}", *[dims] * (len(call.operands) - 1)])
    return bind(f"{operands} -> " + ", ".join([f"... {dims}", *[f"... {ones}"] * (len(call.outputs) - 1)]), call)


def group_norm_of_piece(
    x: Tensor, groups: int, channels: int, weight: Tensor | None = None, bias: Tensor | None = None, *options: Any
) -> Tensor:
    """A group norm of the groups that a rank holds, where there are `groups` groups and `channels` channels in all."""
    if x.numel() == 0:
        return zeros(x.shape, x.dtype, [tensor for tensor in (x, weight, bias) if tensor is not None])
    return torch.group_norm(x, x.shape[1] * groups // channels, weight, bias, *options)


def _local_group_norm(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    if not local.outputs[0].splits:
        return local.target, local.args, local.kwargs
    return group_norm_of_piece, (*local.args[:2], local.call.tensors[0].shape[1], *local.args[2:]), local.kwargs


@rule_for("aten.group_norm.default")
def group_norm(call: Call) -> Rule:
    """Over the channels (dim 1) and all places of a group; rows and groups are free."""
    places = " ".join(f"s{i}^" for i in range(len(call.tensors[0].shape) - 2))
    known = exact_quotient(call.tensors[0].shape[1], call.args[1]) is not None
    c = "(g c^)" if known else "c^"
    return bind(f"n {c} {places}, {c}, {c} -> n {c} {places}", call, sizes={"g": call.args[1]}, local=_local_group_norm)


@rule_for("aten.instance_norm.default")
def instance_norm(call: Call) -> Rule | None:
    """Over the places of each channel of each row. Running statistics are no business of the operator: see clean-up."""
    if not call.argument(5, "use_input_stats") or call.operands[3] is not None:
        return None
    places = " ".join(f"s{i}^" for i in range(len(call.tensors[0].shape) - 2))
    return bind(f"n c {places}, c, c, c, c -> n c {places}", call, local=unless_empty)


@rule_for("autotp.statistics.variance")
def variance(call: Call) -> Rule:
    """Per channel, a sum over the global count."""
    return bind("n c ..., c -> c", call)


@rule_for("autotp.statistics.normalize")
def normalize(call: Call) -> Rule:
    """Pointwise; linear in x, mean and bias together, and in weight and bias together."""
    count = len(call.operands)
    bias = () if call.args[4] is None else (count - 1,)
    groups = ((0, 1, *bias),) if call.args[3] is None else ((0, 1, *bias), (3, *bias))
    operands = ", ".join(["n c ...", *["c"] * (count - 1)])
    return bind(f"{operands} -> n c ...", call, linear=groups)


@rule_for("aten.softmax.int aten._softmax.default aten.log_softmax.int aten._log_softmax.default aten._safe_softmax.default")
def softmax(call: Call) -> Rule:
    """Over one dim."""
    rank = len(call.tensors[0].shape)
    dim = call.argument(1, "dim") % max(rank, 1)
    names = " ".join(f"d{i}^" if i == dim else f"d{i}" for i in range(rank))
    return bind(f"{names} -> {names}", call)
