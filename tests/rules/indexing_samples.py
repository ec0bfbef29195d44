"""Sample calls of lookups, searches and writes into a part of a tensor."""

from __future__ import annotations

import torch
from sampling import SAMPLES, add, booleans, call, each, integers, real

ORDER = torch.randperm(7, generator=torch.Generator().manual_seed(0))
SORTED = real(7).sort().values
ROWS_SORTED = real(3, 7).sort().values
INFINITE = real(7, 3).index_fill(0, torch.tensor([0, 4]), -torch.inf)

# fmt: off
# lookups
add(each("embedding.default", call(INFINITE, integers(2, 3, below=7), gradient=False)))
add(each(
    "gather.default", call(real(7, 3), 0, integers(5, 3, below=7)), call(real(3, 7), 1, integers(2, 5, below=7)),
    call(INFINITE, 0, integers(5, 3, below=7), gradient=False), call(integers(3, 7), -1, integers(3, 5, below=7)),
))
add(each(
    "index.Tensor", call(real(7, 3), [integers(5, below=7)]), call(real(7, 3), [integers(5, below=7) - 7]),
    call(INFINITE, [integers(5, below=7)], gradient=False), call(real(3, 7, 2), [None, integers(5, 2, below=7)]),
    call(booleans(7, 3), [integers(5, below=7)]), call(real(7), [integers(below=7)]),
))
add(each("index_select.default", call(real(7, 3), 0, integers(5, below=7)), call(integers(3, 7), 1, integers(5, below=7))))
add(each("take.default", call(real(5, 3), integers(7, below=15)), call(real(7), integers(2, 3, below=7))))
OFFSETS = torch.tensor([0, 2, 2, 5])
SAMPLES["autotp.lookups.bags"] = [
    *(call(real(7, 5), integers(6, below=7), OFFSETS, False, mode, None, False, -1) for mode in range(3)),
    call(real(7, 5), integers(6, below=7), OFFSETS, False, 0, real(6), False, -1),
    call(real(7, 5), integers(6, below=7), OFFSETS, True, 0, None, True, -1),
    call(real(7, 5), integers(6, below=7), OFFSETS, False, 1, None, False, 2),
]
add(each("bucketize.Tensor", call(real(3, 5), SORTED), call(real(7), SORTED, right=True)))
add(each("one_hot.default", call(integers(3, 5, below=7), 7), call(integers(5, below=3), 3)))
add(each("searchsorted.Tensor", call(SORTED, real(3, 5)), call(ROWS_SORTED, real(3, 5)), call(SORTED, real(7), right=True)))
add(each("searchsorted.Tensor", call(UNSORTED := real(7), real(3, 5), sorter=UNSORTED.argsort(), gradient=False)))
add(each("isin.Tensor_Tensor", call(integers(3, 5), integers(2)), call(integers(7), integers(3, 1))))
add(each("isin.Tensor_Scalar", call(integers(3, 5), 2)))
add(each(
    "histc.default", call(real(3, 5), 4, -1, 1, gradient=False), call(real(7), 5, gradient=False),
    call(integers(9).float(), 5, 0, 4, gradient=False),
))
add(each(
    "diagonal.default", call(real(5, 7)), call(real(3, 5, 5), 1, 1, 2), call(real(5, 3, 7), -1, dim1=0, dim2=-1),
))
add(each("diagonal_copy.default", call(real(3, 5, 5), 1, 1, 2)))
add(each("diag_embed.default", call(real(3, 5)), call(real(5), 1), call(real(2, 3, 5), 0, 0, 2)))
add(each(
    "diagonal_scatter.default", call(real(3, 5, 5), real(3, 5), 0, 1, 2), call(real(5, 7), real(5)),
    call(real(5, 3, 5), real(3, 4), 1, 0, 2),
))

# writes
UNIQUE = torch.stack([ORDER[:5] for _ in range(3)])
add(each(
    "scatter.src", call(real(3, 7), 1, UNIQUE, real(3, 5)), call(real(7, 3), 0, UNIQUE.T.contiguous(), real(6, 3), gradient=False),
    call(real(3, 7), 1, UNIQUE[:2], real(3, 5), gradient=False),
))
add(each("scatter.value", call(real(3, 7), 1, UNIQUE, 0.0), call(real(3, 7), 1, UNIQUE, 2.0), call(real(5, 7), -1, UNIQUE, 0)))
add(each("scatter.value_reduce", call(real(3, 7), 1, UNIQUE, 0.5, reduce="add", gradient=False)))
add(each(
    "scatter.reduce", call(real(3, 7), 1, integers(3, 5, below=7), real(3, 5), reduce="add", gradient=False),
    call(real(3, 7), 1, UNIQUE, real(3, 5), reduce="multiply", gradient=False),
))
ADDED = (
    call(real(3, 7), 1, integers(3, 5, below=7), real(3, 5)), call(real(7, 3), 0, integers(9, 3, below=7), real(9, 3)),
    call(real(3, 7), 1, integers(2, 5, below=7), real(2, 5)), call(real(7), 0, integers(9, below=7), real(9)),
)
add(each("scatter_add.default", *ADDED, call(integers(3, 7), 1, integers(3, 5, below=7), integers(3, 5))))
add(each("scatter_reduce.two", *(call(*sample.args, "sum") for sample in ADDED)))
add(each("scatter_reduce.two", *(
    call(real(3, 7), 1, integers(3, 5, below=7), real(3, 5), kind, include_self=keeps)
    for kind in ("sum", "mean", "amax", "prod") for keeps in (True, False)
)))
add(each(
    "index_add.default", call(real(7, 3), 0, integers(9, below=7), real(9, 3)),
    call(real(3, 7, 2), 1, integers(5, below=7), real(3, 5, 2), alpha=2), call(real(7), 0, integers(5, below=7), real(5)),
))
add(each("index_copy.default", call(real(7, 3), 0, ORDER[:5], real(5, 3)), call(real(3, 7), -1, ORDER, real(3, 7))))
add(each("index_fill.int_Scalar", call(real(3, 7), 1, ORDER[:2], 0.0), call(real(7, 3), 0, ORDER[:2], 1.5)))
add(each("index_fill.int_Tensor", call(real(3, 7), 1, ORDER[:2], real())))
add(each("index_reduce.default", call(real(7, 3), 0, ORDER[:5], real(5, 3), "amax"), call(real(7, 3), 0, ORDER[:5], real(5, 3), "mean")))
add(each(
    "index_put.default", call(real(7, 3), [ORDER[:5]], real(5, 3)), call(real(7, 3), [ORDER[:5]], real(3)),
    call(real(3, 7), [None, ORDER[:5]], real()), call(real(7, 5, 3), [ORDER[:5], ORDER[:5].clamp(max=4)], real(5, 3)),
    call(real(7, 3), [integers(9, below=7)], real(9, 3), True), call(real(7, 3), [integers(9, below=7)], real(3), True),
    call(real(3, 7, 2), [None, integers(5, below=7)], real(3, 5, 2), True),
    call(real(5, 3, 7), [integers(6), None, integers(6)], real(6, 3), True),
    call(real(5, 3, 7), [integers(6), None, integers(1)], real(6, 3), True),
    call(real(5, 7), [integers(2, 1), integers(6)], real(2, 6), True), call(real(7, 3), [integers(5)], real(1, 3), True),
))
add(each("_unsafe_index_put.default", call(real(7, 3), [ORDER[:5]], real(5, 3))))
MASK = booleans(3, 5)
add(each(
    "masked_scatter.default", call(real(3, 5), MASK, real(15)), call(real(3, 5, 7), MASK[..., None], real(15, 7)),
    call(real(3, 5), booleans(3, 1), real(3, 5)), call(real(5, 7), booleans(5, 7), real(5, 7)),
))
add(each("select_scatter.default", call(real(3, 5), real(3), 1, 2), call(real(3, 5, 2), real(5, 2), 0, -1)))
add(each("slice_scatter.default", call(real(3, 7), real(3, 4), 1, 2, 6), call(real(7, 3), real(4, 3), 0, None, None, 2)))
# fmt: on
