"""Mixtures of experts in pieces that can be split by tokens and by experts.

A token goes to several experts. Its (token, expert) pairs are the slots, each with the number of its expert as key; rows are the
slots sorted by key, so that every expert's rows stand together and one grouped matrix product serves all experts.

    order = sort_by_key(keys)                 the sorted keys, and the slot that each row comes from
    rows = dispatch(tokens, order, ...)       a row for each slot
    rows = grouped_product(rows, weight, order, ...)
    slots = combine(rows, order, ...)         back to the order of slots
    tokens = collect(rows, order, ...)        or the sum over every token's slots at once

Clean-up (`grouping.py`) puts these functions in the place of the sorting, counting and indexing that models spell out; their rules
stand in `autotp.rules.experts`. A rank that holds part of the rows is told which by `rows`, their places among all rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def sort_by_key(keys: Tensor) -> Tensor:
    """The sorted keys, and the slots that they come from; equal keys keep their order. Shapes: (slots) → (2, slots), int64."""
    values, slots = torch.sort(keys.long(), stable=True)
    return torch.stack((values, slots))


def dispatch(
    tokens: Tensor, order: Tensor, repeat: int, keys: int, rows: Tensor | None = None, held: Tensor | None = None
) -> Tensor:
    """The token of every row. Shapes: (tokens, ...), (2, tokens · repeat) → (rows, ...).

    Args:
        repeat: slots per token.
        keys: number of keys; it is not read, but a size that rules know.
        rows: the rows wanted; None: all.
        held: the tokens that `tokens` holds, ascending; None: all.
    """
    index = (order[1] if rows is None else order[1, rows]).div(repeat, rounding_mode="floor")
    return tokens.index_select(0, index if held is None else torch.searchsorted(held, index))


def combine(values: Tensor, order: Tensor, keys: int, rows: Tensor | None = None, spread: bool = False) -> Tensor:
    """The value of every slot, in the order of slots. Shapes: (rows, ...), (2, slots) → (slots, ...).

    Args:
        keys: number of keys; it is not read, but a size that rules know.
        rows: the rows that `values` holds; None: all.
        spread: return all slots, with zeros for those of other rows; else the slots of these rows alone.
    """
    slots = order[1] if rows is None else order[1, rows]
    if spread:
        return values.new_zeros((order.shape[1], *values.shape[1:])).index_copy(0, slots, values)
    return values.index_select(0, torch.argsort(slots))


def collect(
    values: Tensor,
    order: Tensor,
    repeat: int,
    keys: int,
    rows: Tensor | None = None,
    spread: bool = False,
    held: Tensor | None = None,
) -> Tensor:
    """The sum of every token's rows. Shapes: (rows, ...), (2, tokens · repeat) → (tokens, ...).

    The arguments are those of `combine` and `dispatch`; `held` are the tokens wanted, ascending, which have no rows but these.
    """
    slots = order[1] if rows is None else order[1, rows]
    tokens = slots.div(repeat, rounding_mode="floor")
    if held is not None and not spread:
        return values.new_zeros((len(held), *values.shape[1:])).index_add(0, torch.searchsorted(held, tokens), values)
    return values.new_zeros((order.shape[1] // repeat, *values.shape[1:])).index_add(0, tokens, values)


def grouped_product(
    values: Tensor, weight: Tensor, order: Tensor, kernel: Callable[..., Tensor], rows: Tensor | None = None, start: int = 0
) -> Tensor:
    """Every row times the matrix of its key. Shapes: (rows, k), (keys, k, n), (2, slots) → (rows, n).

    Args:
        kernel: the operator that multiplies, `kernel(values, weight, offsets)`, with the end of each key's rows in `offsets`.
        rows: the rows that `values` holds; None: all.
        start: the key of the first matrix in `weight`. The rows must have no other keys than those in `weight`.
    """
    keys = order[0] if rows is None else order[0, rows]
    if weight.shape[0] == 0 or values.shape[0] == 0:
        return values.new_zeros((values.shape[0], weight.shape[2])) + 0 * (values.sum() + weight.sum())
    ends = torch.arange(start + 1, start + 1 + weight.shape[0], device=keys.device)
    return kernel(values, weight, torch.searchsorted(keys.contiguous(), ends).to(torch.int32))
