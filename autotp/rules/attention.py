"""Scaled dot-product attention."""

from __future__ import annotations

from autotp.rules.language import Call, Rule, bind, exact_quotient
from autotp.rules.registry import rule_for


@rule_for("aten.scaled_dot_product_attention.default")
def attention(call: Call) -> Rule:
    """softmax(q kᵀ) v. Grouped heads: q's head dim is (group, repeat), and k and v have the groups only.

    Splitting the repeats keeps k and v whole: that is how 14 query heads over 2 key heads run on 4 ranks.
    With `is_causal` the query positions stay whole, because a mask made inside the operator knows no offset.
    """
    q, k = call.tensors[0], call.tensors[1]
    causal = bool(call.argument(5, "is_causal", False))
    dropout = float(call.argument(4, "dropout_p", 0.0) or 0.0)
    rank = len(q.shape)
    heads = rank > 3 and k.shape[-3] not in (1, q.shape[-3])
    grouped = heads and exact_quotient(q.shape[-3], k.shape[-3]) is not None
    query_head = "(h r)" if grouped else "g^" if heads else "h"
    key_head = "h^" if heads and not grouped else "h"
    batch = " ".join(f"b{i}" for i in range(rank - 3))
    s = "s^" if causal else "s"
    operands = [f"{batch} {query_head} {s} e^", f"{batch} {key_head} t^ e^", f"{batch} {key_head} t^ f^"]
    if rank == 2:
        operands, query_head = [f"{s} e^", "t^ e^", "t^ f^"], ""
    mask_rank = len(call.tensors[3].shape) if len(call.tensors) == 4 else 2
    operands.append(" ".join([*(f"b{i}" for i in range(rank - 3)), query_head, s, "t^"][-mask_rank:]))
    return bind(
        f"{', '.join(operands)} -> {batch} {query_head} {s} f^",
        call,
        linear=((2,),),
        work="attention",
        random=dropout > 0,
    )
