"""Sample calls of shape operators beyond `rule_samples`: stretches that are parts, steps, crossing views; and of products."""

from __future__ import annotations

from sampling import add, call, each, real

# fmt: off
add(each(
    "slice.Tensor", call(real(3, 24), 1, 0, 12), call(real(3, 24), 1, 12, 24), call(real(24, 3), 0, 6, 18),
    call(real(3, 24), 1, -8), call(real(3, 24), -1, 0, 24, 2), call(real(2, 6, 3), 1, 1, 6, 3), call(real(3, 24), 1, 3, 24, 4),
    call(real(3, 24), 1, 2, 23, 2), call(real(3, 24), 1, 30, 40), call(real(3, 24), 1, 8, 9), call(real(3, 24), 1, -40, 8),
))
add(each("narrow.default", call(real(3, 24), 1, 6, 12), call(real(3, 24), -1, -8, 8), call(real(5, 3), 0, 1, 3)))
add(each("rot90.default", call(real(3, 5, 7)), call(real(3, 5, 7), 2, [2, 0]), call(real(3, 5), 3)))
add(each("repeat_interleave.self_int", call(real(3, 5), 2), call(real(7), 3), call(real(3, 1, 5), 2, None)))
add(each("tensor_split.indices", call(real(3, 12), [2, 8], 1), call(real(7, 3), [3]), call(real(7, 3), [0, 9])))
add(each("unsafe_split.Tensor", call(real(3, 10), 5, 1), call(real(7, 3), 3)))
add(each("unsafe_split_with_sizes.default split.sizes", call(real(3, 18), [6, 6, 6], 1), call(real(5, 3), [2, 3])))
add(each("unsafe_chunk.default", call(real(3, 10), 2, 1), call(real(7, 3), 3)))
add(each("block_diag.default", call([real(5, 3), real(7, 2)]), call([real(6, 4), real(3, 4), real(3, 8)])))
add(each(
    "reshape.default", call(real(5, 4, 9), [5, 6, 6]), call(real(5, 4, 9, 7), [5, 6, 6, 7]), call(real(2, 4, 9, 5), [8, 9, 5]),
    call(real(6, 4, 9), [2, 3, 6, 6]), call(real(10, 7, 3), [5, 7, 6]), call(real(4, 6, 5, 3), [3, 8, 15]),
))

add(each(
    "einsum.default", call("...ij,...jk->...ik", [real(5, 2, 3), real(5, 3, 7)]), call("...i,ij->...j", [real(2, 5, 3), real(3, 7)]),
    call("bij,ij", [real(5, 3, 7), real(3, 7)]), call("ba,ca", [real(3, 5), real(7, 5)]), call("bii->bi", [real(3, 5, 5)]),
    call("bii->b", [real(3, 5, 5)]), call("...i", [real(3, 5)]), call("i...->...", [real(3, 5)]),
    call("bcl,bsh,bhc->bls", [real(2, 3, 5), real(2, 5, 3), real(2, 3, 3)]), call("ij,ij->", [real(3, 5), real(3, 5)]),
    call("...ij,...j->...i", [real(3, 1, 5, 2), real(7, 2)]), call("bAa,Aa->bA", [real(3, 5, 2), real(5, 2)]),
))
add(each(
    "addbmm.default", call(real(5, 7), real(3, 5, 2), real(3, 2, 7)), call(real(7), real(3, 5, 2), real(3, 2, 7), beta=0.5),
))
add(each("addmv.default", call(real(5), real(5, 3), real(3)), call(real(7), real(7, 5), real(5), alpha=2)))
add(each("addr.default", call(real(5, 7), real(5), real(7)), call(real(7), real(5), real(7), alpha=2)))
add(each("vdot.default", call(real(7), real(7))))
add(each("linalg_cross.default", call(real(5, 3), real(5, 3)), call(real(3, 5), real(3, 1), dim=0)))
add(each("linalg_matrix_exp.default linalg_inv.default", call(real(5, 3, 3)), call(real(2, 3, 2, 2))))
add(each("linalg_matrix_power.default", call(real(5, 3, 3), 3)))
POSITIVE = real(5, 3, 3)
add(each("linalg_cholesky.default", call(POSITIVE @ POSITIVE.mT + 3 * POSITIVE.new_ones(3).diag())))
add(each("_cdist_forward.default", call(real(5, 3), real(7, 3), 2.0, None), call(real(2, 5, 3), real(2, 3, 3), 1.0, None)))
add(each(
    "_trilinear.default", call(real(5, 3), real(7, 3, 2), real(5, 2), [1, 3], [0], [1, 2], [2, 3]),
    call(real(3, 2), real(3, 5), real(2, 5), [2], [1], [0], [2]),
))
# fmt: on
