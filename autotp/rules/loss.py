"""Cross-entropy in the pieces of `autotp.losses`, whose rows and classes can both be split, and losses that are one operator."""

from __future__ import annotations

import math
from typing import Any

from autotp.losses import MEAN, NONE, SUM, share_of_losses
from autotp.rules.language import Call, Local, LocalSize, LocalStart, Rule, bind
from autotp.rules.registry import rule, rule_for


@rule_for("autotp.losses.row_maximum")
def _row_maximum(call: Call) -> Rule:
    return bind("... c -> ...", call, reduction="M")


rule("autotp.losses.sum_exp", "... c, ... -> ...")
rule("autotp.losses.log_of_sum autotp.losses.kept_rows", "..., ... -> ...")
rule("autotp.losses.rows_of_loss", "..., ..., ..., ... -> ...")
rule("autotp.losses.weight_of_rows", "c^, ... -> ...")


def _local_pick(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    split = local.operand_split(0, len(local.call.tensors[0].shape) - 1)
    if split is None:
        return local.target, local.args, local.kwargs
    return local.target, (*local.args[:2], LocalStart(split), LocalSize(split)), {}


@rule_for("autotp.losses.pick")
def _pick(call: Call) -> Rule:
    return bind("... c!, ... -> ...", call, linear=((0,),), local=_local_pick)


# ---- losses of one operator -----------------------------------------------------------------------------------------

REDUCTION = {
    "aten.mse_loss.default": 2,
    "aten.smooth_l1_loss.default": 2,
    "aten.huber_loss.default": 2,
    "aten.soft_margin_loss.default": 2,
    "aten.binary_cross_entropy.default": 3,
    "aten.binary_cross_entropy_with_logits.default": 4,
    "aten.multi_margin_loss.default": 5,
    "aten.multilabel_margin_loss.default": 2,
}
"""Which argument of each operator is its reduction."""


def _local_loss(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Where losses that are split are averaged: the share of the local ones in the mean.

    So it is for the sum of rows of a margin loss, whose operator fails for no rows.
    """
    place, by_row = REDUCTION[local.call.op], "multi" in local.call.op
    reduction = local.call.argument(place, "reduction", MEAN)
    split = any(layout is not None and layout.splits for layout in local.operands)
    if not split or reduction == NONE or (reduction == SUM and not by_row):
        return local.target, local.args, local.kwargs
    missing = local.target._schema.arguments[len(local.args) :]
    args = [*local.args, *(local.kwargs.get(argument.name, argument.default_value) for argument in missing)]
    shape = local.call.tensors[0].shape
    count = math.prod(shape[:1] if by_row else shape) if reduction == MEAN else 1
    return share_of_losses, (local.call.op.split(".")[1], place, count, *args), {}


def _reduced(call: Call, operands: list[str], losses: str) -> Rule:
    """Bind a pattern whose factors are special where the losses are summed or averaged."""
    reduction = call.argument(REDUCTION[call.op], "reduction", MEAN)
    mark = "" if reduction == NONE else "!"
    left = ", ".join(" ".join(name if name.endswith("^") else name + mark for name in term.split()) for term in operands)
    return bind(f"{left} -> {losses if reduction == NONE else ''}", call, local=_local_loss)


@rule_for("""
    aten.mse_loss.default aten.smooth_l1_loss.default aten.huber_loss.default aten.soft_margin_loss.default
    aten.binary_cross_entropy.default aten.binary_cross_entropy_with_logits.default
""")
def elementwise_loss(call: Call) -> Rule | None:
    """A loss for every element, their sum, or their sum over the global count."""
    if call.tensors[0].shape != call.tensors[1].shape:
        return None  # their gradients do not broadcast
    dims = [f"d{i}" for i in range(len(call.tensors[0].shape))]
    terms = [" ".join(dims[len(dims) - len(operand.shape) :]) if operand else "" for operand in call.operands]
    return _reduced(call, terms, " ".join(dims))


@rule_for("aten.multi_margin_loss.default aten.multilabel_margin_loss.default")
def margin_loss(call: Call) -> Rule | None:
    """A loss for every row; its classes stay whole."""
    if len(call.tensors[0].shape) != 2:
        return None
    return _reduced(call, ["n c^", "n" if "multi_" in call.op else "n c^", "c^"][: len(call.operands)], "n")
