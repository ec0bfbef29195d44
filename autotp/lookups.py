"""Bags of looked-up rows: `embedding_bag` with its one result that is used, which can be split by features and by rows."""

from __future__ import annotations

import torch
from torch import Tensor

from autotp import _torch

SUM_OF_BAG, MEAN_OF_BAG, MAXIMUM_OF_BAG = 0, 1, 2
"""PyTorch's modes of `embedding_bag`, as its operator numbers them."""


def bags(
    weight: Tensor,
    ids: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool,
    mode: int,
    weights: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
) -> Tensor:
    """The sum, mean or maximum of every bag's rows. Shapes: (rows, features), (ids), (bags) → (bags, features)."""
    options = (scale_grad_by_freq, mode, False, weights, include_last_offset, padding_idx)
    found: Tensor = torch.ops.aten._embedding_bag.default(weight, ids, offsets, *options)[0]
    return found


def sums_of_held_rows(
    weight: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor | None, include_last_offset: bool, start: int, rows: int
) -> Tensor:
    """Per bag, the sum of the rows [start, start + len(weight)) of a table of `rows` rows; nothing for other ids.

    Raises:
        RuntimeError: an id is not in the table (on a GPU when the device is next synchronised).
    """
    _torch.assert_all((ids >= 0) & (ids < rows), "an id of the embedding is out of bounds")
    here = (ids >= start) & (ids < start + weight.shape[0])
    if weight.shape[0] == 0:
        return weight.new_zeros((offsets.shape[0] - include_last_offset, weight.shape[1])) + weight.sum()
    weights = here.to(weight.dtype) if weights is None else weights.where(here, 0)
    return bags(weight, (ids - start).where(here, 0), offsets, False, SUM_OF_BAG, weights, include_last_offset, -1)
