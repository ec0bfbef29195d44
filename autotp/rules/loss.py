"""Cross-entropy, in the pieces of `autotp.losses`: rows and vocabulary can both be split."""

from __future__ import annotations

from typing import Any

from autotp.rules.language import Call, Local, LocalSize, LocalStart, Rule, bind
from autotp.rules.registry import rule_for


@rule_for("autotp.losses.row_maximum")
def _row_maximum(call: Call) -> Rule:
    return bind("n c -> n", call, reduction="M")


@rule_for("autotp.losses.sum_exp")
def _sum_exp(call: Call) -> Rule:
    return bind("n c, n -> n", call)


def _local_pick(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    split = local.operand_split(0, 1)
    if split is None:
        return local.target, local.args, local.kwargs
    return local.target, (*local.args[:2], LocalStart(split), LocalSize(split)), {}


@rule_for("autotp.losses.pick")
def _pick(call: Call) -> Rule:
    return bind("n c!, n -> n", call, linear=((0,),), local=_local_pick)


@rule_for("autotp.losses.rows_of_loss")
def _rows_of_loss(call: Call) -> Rule:
    return bind("n, n, n, n -> n", call)
