"""Scaled dot-product attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autotp.rules.empty import unless_empty, zeros
from autotp.rules.language import Call, Local, LocalStart, Rule, bind, exact_quotient
from autotp.rules.registry import rule_for


def causal_attention_of_rows(
    q: Tensor, k: Tensor, v: Tensor, start: int, dropout_p: float = 0.0, scale: float | None = None, enable_gqa: bool = False
) -> Tensor:
    """Causal attention of the queries at positions [start, start + rows) to all keys: position i sees the keys j <= i.

    PyTorch aligns `is_causal` at the first query and the first key. Later queries see a stretch of the keys that ends below
    their diagonal: `causal_lower_right` says that without a mask in memory and keeps the flash kernel. A compiled graph, which
    cannot hold such a bias, and queries beyond the last key get a mask of booleans.

    Args:
        q: (..., heads, rows, e); k: (..., kv heads, keys, e); v: (..., kv heads, keys, f).
        start: position of the first row of `q`; any if there are no rows.
        dropout_p, scale, enable_gqa: as in `torch.nn.functional.scaled_dot_product_attention`.

    Returns:
        (..., heads, rows, f).
    """
    if not q.numel():
        return zeros((*q.shape[:-1], v.shape[-1]), q.dtype, (q, k, v))
    if start == 0:
        return functional.scaled_dot_product_attention(q, k, v, None, dropout_p, True, scale=scale, enable_gqa=enable_gqa)
    rows, keys = q.shape[-2], k.shape[-2]
    mask: Tensor
    if start + rows <= keys:
        keys = start + rows
        k, v = k.narrow(-2, 0, keys), v.narrow(-2, 0, keys)
    if start + rows == keys and not torch.compiler.is_dynamo_compiling():
        from torch.nn.attention.bias import causal_lower_right  # imports the compiler, which takes a second

        mask = causal_lower_right(rows, keys)
    else:
        mask = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril(start)
    return functional.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=scale, enable_gqa=enable_gqa)


def _local_causal_attention(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    split = local.operand_split(0, len(local.call.tensors[0].shape) - 2)
    if split is None:
        return unless_empty(local)
    dropout, scale, grouped = dropout_of(local.call), local.call.kwargs.get("scale"), local.call.kwargs.get("enable_gqa", False)
    return causal_attention_of_rows, (*local.args[:3], LocalStart(split), dropout, scale, grouped), {}


def dropout_of(call: Call) -> float:
    """The probability with which a call drops attention weights."""
    return float(call.argument(4, "dropout_p", 0.0) or 0.0)


@rule_for("aten.scaled_dot_product_attention.default")
def attention(call: Call) -> Rule:
    """softmax(q kᵀ) v. Grouped heads: q's head dim is (group, repeat), and k and v have the groups only.

    Splitting the repeats keeps k and v whole: that is how 14 query heads over 2 key heads run on 4 ranks. Splitting the query
    positions does so too (context parallelism); with `is_causal` the mask must then know the position of a rank's first query.
    """
    q, k = call.tensors[0], call.tensors[1]
    causal = bool(call.argument(5, "is_causal", False))
    rank = len(q.shape)
    heads = rank > 3 and k.shape[-3] not in (1, q.shape[-3])
    grouped = heads and exact_quotient(q.shape[-3], k.shape[-3]) is not None
    query_head = "(h r)" if grouped else "g^" if heads else "h"
    key_head = "h^" if heads and not grouped else "h"
    batch = " ".join(f"b{i}" for i in range(rank - 3))
    s = "s!" if causal else "s"
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
        random=dropout_of(call) > 0,
        local=_local_causal_attention if causal else unless_empty,  # PyTorch's result for no queries or heads is a constant
    )
