"""Sample calls of every operator that has a rule, with sizes (5, 7, 3) that give uneven and empty pieces on 2, 3 and 4 ranks."""

from __future__ import annotations

import torch
from sampling import INFINITY, SAMPLES, add, booleans, call, each, integers, positive, real

ONE_OPERAND = """
    abs.default atan.default ceil.default celu.default cos.default cosh.default elu.default erf.default erfc.default exp.default
    exp2.default expm1.default floor.default gelu.default hardsigmoid.default hardswish.default hardtanh.default isinf.default
    isnan.default leaky_relu.default log_sigmoid.default logical_not.default mish.default nan_to_num.default neg.default
    relu.default relu6.default round.default selu.default sigmoid.default sign.default silu.default sin.default sinh.default
    softplus.default square.default tan.default tanh.default trunc.default detach.default zeros_like.default ones_like.default
    empty_like.default
"""
POSITIVE_OPERAND = """
    acos.default erfinv.default log.default log10.default log1p.default log2.default reciprocal.default rsqrt.default sqrt.default
"""
TWO_OPERANDS = """
    add.Tensor sub.Tensor mul.Tensor multiply.Tensor div.Tensor maximum.default minimum.default max.other min.other atan2.default
    eq.Tensor ne.Tensor lt.Tensor le.Tensor gt.Tensor ge.Tensor logical_and.default logical_or.default logical_xor.default
"""
ONE_AND_SCALAR = """
    add.Tensor sub.Tensor rsub.Scalar mul.Tensor mul.Scalar div.Tensor div.Scalar eq.Scalar ne.Scalar lt.Scalar
    le.Scalar gt.Scalar ge.Scalar clamp_min.default clamp_max.default
"""
BITS = "__and__.Tensor __or__.Tensor __xor__.Tensor bitwise_and.Tensor bitwise_or.Tensor"

PREDICATE = booleans(3, 5)
SEGMENTS = integers(2, 5, below=7)

# fmt: off
# elementwise
add(each(ONE_OPERAND, call(real(3, 5)), call(real(7))))
add(each(POSITIVE_OPERAND, call(positive(3, 5)), call(positive(7))))
add(each(TWO_OPERANDS, call(real(3, 5), real(3, 5)), call(real(2, 1, 5), real(3, 1)), call(real(5), real())))
add(each(ONE_AND_SCALAR, call(real(3, 5), 0.5), call(real(7), 2)))
add(each("add.Tensor sub.Tensor", call(real(3, 5), real(5), alpha=3), call(integers(5), integers(3, 5))))
add(each("rsub.Scalar", call(real(5), 0)))
add(each("mul.Tensor", call(booleans(3, 5), real(3, 5)), call(integers(5), integers(5)), call(real(5, 1), real(1, 7))))
add(each("add.Scalar sub.Scalar", call(real(3, 5), 0.5), call(real(7), 2)))
add(each("polar.default", call(real(3, 5), real(3, 5))))
add(each("div.Tensor_mode", *(call(real(3, 5), 0.3, rounding_mode=mode) for mode in (None, "floor", "trunc"))))
add(each("div.Tensor_mode", call(real(3, 5), real(5), rounding_mode="floor")))
add(each(
    "floor_divide.default", call(real(3, 5), 2, gradient=False), call(integers(7), 2),
    call(integers(3, 5), integers(5) + 1),
))
add(each("remainder.Scalar", call(real(3, 5), 0.7)))
add(each("remainder.Tensor", call(real(3, 5), positive(5))))
add(each("clamp.default", call(real(3, 5), -0.5, 0.5), call(real(7), min=0), call(real(7), None, 1)))
add(each(
    "clamp.Tensor", call(real(3, 5), real(5)), call(real(3, 5), None, real(3, 1)), call(real(5), real(5), real(5)),
))
add(each("gelu.default", call(real(3, 5), approximate="tanh")))
add(each("elu.default", call(real(5), 0.5)))
add(each("leaky_relu.default", call(real(5), 0.2)))
add(each("softplus.default", call(real(5), 2, 1)))
add(each("hardtanh.default", call(real(5), -0.2, 0.3)))
add(each("threshold.default", call(real(3, 5), 0.1, 20)))
add(each("pow.Tensor_Scalar", call(real(3, 5), 2), call(positive(5), -0.5), call(real(5), 1)))
add(each("pow.Scalar", call(2, real(3, 5)), call(10000.0, real(7))))
add(each("pow.Tensor_Tensor", call(positive(3, 5), real(5)), call(positive(3, 1), real(1, 7))))
add(each("prelu.default", call(real(3, 5, 2), real(5)), call(real(3, 5), real(1)), call(real(7), real(1))))
add(each(BITS, call(booleans(3, 5), booleans(5)), call(integers(7), integers(7))))
add(each(
    "__and__.Scalar __or__.Scalar bitwise_and.Scalar bitwise_or.Scalar", call(integers(3, 5), 3),
    call(booleans(7), True),
))
add(each("bitwise_not.default", call(booleans(3, 5)), call(integers(7))))
add(each("logical_not.default", call(booleans(3, 5)), call(integers(7))))
add(each(
    "where.self", call(PREDICATE, real(3, 5), real(3, 5)), call(booleans(3, 1), real(5), real()),
    call(booleans(5), real(5), real(3, 5)),
))
add(each(
    "where.ScalarOther", call(PREDICATE, real(3, 5), 0.0), call(PREDICATE, real(5), 1.5),
    call(PREDICATE, real(5), -INFINITY),
))
add(each("where.ScalarSelf", call(PREDICATE, 0.0, real(3, 5)), call(PREDICATE, 1.5, real(5))))
add(each("where.Scalar", call(PREDICATE, 0.0, 2.0), call(booleans(7), 1.0, -INFINITY)))
add(each(
    "masked_fill.Scalar", call(real(3, 5), PREDICATE, 0), call(real(3, 5), PREDICATE, 2.5),
    call(real(2, 3, 5), PREDICATE, 0.0),
))
add(each("masked_fill.Scalar", call(real(3, 5), booleans(3, 1), value=-INFINITY), call(real(3, 5), PREDICATE, -0.0)))
add(each(
    "masked_fill.Tensor", call(real(3, 5), PREDICATE, real()),
    call(real(3, 5), booleans(5), torch.zeros((), dtype=torch.float64)),
))
add(each("addcmul.default", call(real(3, 5), real(3, 5), real(5)), call(real(5), real(3, 1), real(3, 5), value=0.5)))
add(each("lerp.Scalar", call(real(3, 5), real(3, 5), 0.3), call(real(5), real(3, 5), 2.0)))
add(each("glu.default", call(real(3, 10)), call(real(6, 5), 0), call(real(5, 6, 3), dim=-2)))
add(each(
    "to.dtype", call(real(3, 5), torch.float32), call(real(3, 5), torch.int64), call(integers(7), torch.float64),
    call(integers(7), torch.bool),
))
add(each("real.default", call(torch.complex(real(3, 5), real(3, 5)))))
add(each("full_like.default", call(real(3, 5), 2.5), call(integers(7), 3)))
add(each("zeros_like.default ones_like.default", call(real(5), dtype=torch.bool)))

# random
add(each("dropout.default", call(real(3, 5), 0.5, True), call(real(3, 7), 0.5, False), call(real(5), 0.1, True)))
add(each("native_dropout.default", call(real(3, 5), 0.5, True), call(real(7), 0.3, None)))
add(each("rand_like.default randn_like.default", call(real(3, 5)), call(real(7))))
add(each("bernoulli.default", call(positive(3, 5)), call(integers(7, below=2).double())))

# products
add(each(
    "linear.default", call(real(5, 3), real(7, 3), real(7)), call(real(2, 5, 6), real(3, 6)),
    call(real(5), real(7, 5), real(7)),
))
add(each(
    "linear.default", call(real(3, 5), real(7, 5), None), call(real(2, 1), real(5, 1), real(5)),
    call(real(1, 5), real(1, 5), real(1)),
))
add(each("linear.default", call(real(3, 5), real(5)), call(real(5), real(5))))
add(each("mm.default", call(real(5, 3), real(3, 7)), call(real(1, 5), real(5, 1))))
add(each("bmm.default", call(real(3, 2, 5), real(3, 5, 7)), call(real(1, 5, 3), real(1, 3, 2))))
add(each("mv.default", call(real(5, 7), real(7))))
add(each("dot.default", call(real(7), real(7))))
add(each("outer.default", call(real(5), real(7))))
add(each("addmm.default", call(real(7), real(5, 3), real(3, 7)), call(real(5, 7), real(5, 3), real(3, 7))))
add(each(
    "addmm.default", call(real(5, 1), real(5, 3), real(3, 7)), call(real(), real(5, 3), real(3, 7), beta=2, alpha=0.5),
))
add(each("addmm.default", call(real(1, 7), real(5, 3), real(3, 7), alpha=2)))
add(each(
    "baddbmm.default", call(real(3, 2, 7), real(3, 2, 5), real(3, 5, 7)),
    call(real(3, 1, 7), real(3, 2, 5), real(3, 5, 7), beta=0.5),
))
add(each(
    "baddbmm.default", call(real(2, 7), real(3, 2, 5), real(3, 5, 7), alpha=3),
    call(real(1), real(3, 2, 5), real(3, 5, 7)),
))
add(each(
    "matmul.default", call(real(5, 3), real(3, 7)), call(real(5), real(5)), call(real(5), real(5, 7)),
    call(real(3, 5), real(5)),
))
add(each(
    "matmul.default", call(real(2, 3, 5), real(5, 7)), call(real(3, 1, 2, 5), real(4, 5, 3)),
    call(real(5), real(3, 5, 2)),
))
add(each(
    "matmul.default", call(real(3, 2, 5), real(5)), call(real(2, 3, 5), real(2, 5, 7)), call(real(3, 5), real(2, 5, 7)),
))
add(each("einsum.default", call("bij,bjk->bik", [real(3, 2, 5), real(3, 5, 7)]), call("i,j->ij", [real(5), real(7)])))
add(each(
    "einsum.default", call("bhd,hd->bh", [real(3, 2, 5), real(2, 5)]), call("ij->ji", [real(3, 5)]),
    call("ij->i", [real(5, 7)]),
))
add(each("einsum.default", call("ab, bc, cd -> ad", [real(3, 2), real(2, 5), real(5, 3)])))

# attention
add(each("scaled_dot_product_attention.default", call(real(2, 3, 5, 4), real(2, 3, 7, 4), real(2, 3, 7, 4))))
add(each(
    "scaled_dot_product_attention.default", call(real(2, 3, 5, 4), real(2, 3, 5, 4), real(2, 3, 5, 4), is_causal=True),
    call(real(2, 3, 5, 4), real(2, 3, 7, 4), real(2, 3, 7, 6), real(2, 1, 5, 7)),
    call(real(3, 2, 5, 4), real(3, 2, 5, 4), real(3, 2, 5, 4), booleans(5, 5) | torch.eye(5, dtype=torch.bool), scale=0.3),
    call(real(2, 6, 5, 4), real(2, 2, 5, 4), real(2, 2, 5, 4), is_causal=True, enable_gqa=True),
    call(real(2, 6, 5, 4), real(2, 3, 7, 4), real(2, 3, 7, 4), real(2, 6, 5, 7), enable_gqa=True),
    call(real(2, 6, 3, 4), real(2, 1, 5, 4), real(2, 1, 5, 4), enable_gqa=True),
    call(real(3, 5, 4), real(3, 7, 4), real(3, 7, 4), real(5, 7)), call(real(5, 4), real(7, 4), real(7, 4)),
    call(real(2, 3, 5, 4), real(2, 3, 5, 4), real(2, 3, 5, 4), dropout_p=0.5),
))

# lookups
add(each("embedding.default", call(real(7, 3), integers(3, 5, below=7), -1, True)))
add(each("embedding.default", call(real(7, 3), SEGMENTS), call(real(7, 3), SEGMENTS, 2), call(real(7, 3), SEGMENTS, 0)))
add(each("embedding.default", call(real(7, 5), integers(5, below=7), padding_idx=6), call(real(5, 1), integers(3, 1))))
add(each(
    "gather.default", call(real(3, 5), 1, integers(3, 7)), call(real(5, 3), 0, integers(2, 3)),
    call(real(3, 5, 2), -2, integers(3, 4, 1)),
))
add(each(
    "index.Tensor", call(real(5, 3), [integers(7)]), call(real(3, 5), [None, integers(2, 3)]),
    call(real(5, 3, 2), [integers(7), None, integers(1, below=2)]),
))
add(each("index.Tensor", call(real(3, 5, 5, 2), [None, integers(3, 1), integers(7)]), call(real(5), [integers(3, 2)])))
add(each(
    "index_select.default", call(real(5, 3), 0, integers(7)), call(real(3, 5), -1, integers(5)),
    call(real(2, 5, 3), 1, integers(1)),
))
add(each("tril.default triu.default", call(real(5, 7)), call(real(3, 5, 5), 1), call(real(3, 2, 2, 5), -1)))

# normalisation
add(each(
    "layer_norm.default", call(real(3, 5), [5], real(5), real(5)), call(real(2, 3, 5), [3, 5], real(3, 5)),
    call(real(3, 2, 5), [5]),
))
add(each("rms_norm.default", call(real(3, 5), [5], real(5)), call(real(3, 2, 5), [5], None, 1e-05)))
add(each(
    "group_norm.default", call(real(5, 6, 3), 3, real(6), real(6)), call(real(7, 4), 2), call(real(3, 4, 2, 2), 1, real(4)),
))
SOFTMAX = call(real(3, 5), -1), call(real(5, 3), 0), call(real(2, 5, 3), 1)
add(each("softmax.int log_softmax.int _safe_softmax.default", *SOFTMAX, call(real(5), 0)))
add(each("softmax.int log_softmax.int", call(real(3, 5), -1, torch.float64)))
add(each("_softmax.default _log_softmax.default", *(call(*sample.args, False) for sample in SOFTMAX)))

# reductions
ALONG = (
    call(real(3, 5), [1]),
    call(real(3, 5), [0], True),
    call(real(2, 3, 5), [-1, 0]),
    call(real(2, 3, 5), [1], keepdim=True),
)
add(each("sum.dim_IntList mean.dim amax.default amin.default logsumexp.default", *ALONG))
add(each(
    "sum.dim_IntList mean.dim", call(real(3, 5), None), call(real(3, 5), []), call(real(7), [0], dtype=torch.float64),
))
add(each("sum.dim_IntList", call(booleans(3, 5), [0]), call(integers(7), [0])))
add(each("sum.default mean.default", call(real(3, 5)), call(real(7))))
add(each("sum.default", call(real(3, 5), dtype=torch.float64), call(booleans(7))))
add(each("mean.default", call(real(3, 5), dtype=torch.float64)))
ONE_DIM = call(real(3, 5), 1), call(real(3, 5), 0, True), call(real(2, 5, 3), -2), call(real(2, 5, 3), 1, keepdim=True)
add(each("max.dim min.dim prod.dim_int any.dim all.dim argmax.default argmin.default", *ONE_DIM))
add(each("argmax.default argmin.default", call(real(3, 5)), call(real(3, 5), keepdim=True), call(real(7))))
add(each(
    "var.dim std.dim", call(real(3, 5), [1]), call(real(3, 5), [0], False, True),
    call(real(2, 3, 5), [0, -1], unbiased=False), call(real(3, 5), None),
))
add(each(
    "var.correction std.correction", call(real(3, 5), [1]), call(real(3, 5), [0], correction=0, keepdim=True),
    call(real(3, 5), None, correction=1),
))
add(each(
    "linalg_vector_norm.default", call(real(3, 5)), call(real(3, 5), 1, [0]), call(real(3, 5), 2, [-1], True),
    call(real(5, 3), 3.0, dim=[0]),
))
add(each(
    "cumsum.default cumprod.default logcumsumexp.default", call(real(3, 5), 1), call(real(5, 3), 0),
    call(real(2, 3, 5), -2),
))
add(each("sort.default", call(real(3, 5)), call(real(5, 3), 0, True), call(real(2, 5, 3), 1)))
add(each(
    "topk.default", call(real(3, 5), 2), call(real(5, 3), 3, 0), call(real(2, 7, 3), 2, -2, False), call(real(7, 5), 5),
))

# shapes
add(each(
    "reshape.default", call(real(3, 10), [3, 2, 5]), call(real(3, 2, 5), [3, 10]), call(real(2, 3, 5), [6, 5]),
    call(real(6, 4), [3, 8]), call(real(5, 6), [5, -1, 1]), call(real(3, 5, 7), [3, 7, 5]), call(real(2, 3, 4), [24]),
    call(real(30), [5, 6]), call(real(3, 1, 12), [3, 3, 2, 2]), call(real(1), []),
))
add(each(
    "flatten.using_ints", call(real(2, 3, 5)), call(real(3, 2, 5), 1), call(real(2, 3, 5), 0, 1),
    call(real(3, 5, 2), -2, -1),
))
add(each("unflatten.int", call(real(3, 10), 1, [2, 5]), call(real(10, 3), 0, [5, -1]), call(real(2, 15), -1, [3, 5])))
add(each(
    "expand.default", call(real(5, 1), [5, 7]), call(real(3, 5), [2, 3, 5]), call(real(3, 1, 5), [-1, 2, -1]),
    call(real(), [7]), call(real(1, 3), [5, 3]),
))
add(each("broadcast_to.default", call(real(5, 1), [3, 5, 7])))
add(each("view_as_complex.default", call(real(3, 5, 2)), call(real(7, 2))))
add(each("view_as_real.default", call(torch.complex(real(3, 5), real(3, 5)))))
add(each("transpose.int movedim.int", call(real(), 0, 0)))
add(each("transpose.int", call(real(3, 5), 0, 1), call(real(3, 5, 7), 1, -1), call(real(2, 3, 5), -3, -2)))
add(each("t.default numpy_T.default", call(real(3, 5)), call(real(7))))
add(each("permute.default", call(real(3, 5, 2), [1, 2, 0]), call(real(2, 3, 5), [-1, 0, 1]), call(real(3, 5), [0, 1])))
add(each("movedim.int", call(real(3, 5, 2), 0, 2), call(real(2, 3, 5), -1, 0)))
add(each("unsqueeze.default", call(real(3, 5), 0), call(real(3, 5), -1), call(real(3, 5), 1), call(real(), 0)))
add(each("squeeze.default", call(real(3, 1, 5)), call(real(1, 7, 1)), call(real(2, 3))))
add(each("squeeze.dim unsqueeze.default", call(real(), 0)))
add(each("squeeze.dim", call(real(3, 1, 5), 1), call(real(3, 5, 1), -1), call(real(3, 5), 0)))
add(each("squeeze.dims", call(real(3, 1, 5, 1), [1, -1]), call(real(3, 1, 5), [0, 1])))
add(each(
    "repeat.default", call(real(3, 5), [1, 2]), call(real(5), [3, 2]), call(real(3, 1), [1, 4]),
    call(real(3, 5), [2, 1, 1]),
))
add(each(
    "repeat_interleave.self_int", call(real(3, 5), 2, 1), call(real(5, 3), 3, 0), call(real(2, 3, 5), 2, dim=-2),
    call(real(5, 1), 3, 1),
))
add(each(
    "slice.Tensor", call(real(5, 7), 1, 2, 6), call(real(5, 3), 0, 1, None, 2), call(real(3, 5), -1, None, -1),
    call(real(5, 3)),
))
add(each("flip.default", call(real(), [0])))
add(each("unfold.default", call(real(), 0, 1, 1)))
add(each("roll.default", call(real(3, 5), [1], [1]), call(real(3, 5), [2]), call(real(2, 3, 5), [1, -1], [0, -1])))
add(each("flip.default", call(real(3, 5), [1]), call(real(2, 3, 5), [0, -1])))
add(each(
    "constant_pad_nd.default", call(real(3, 5), [1, 2]), call(real(3, 5), [0, 0, 1, 0], 2.0),
    call(real(3, 5), [-1, 0], 0.0),
))
add(each(
    "pad.default", call(real(3, 5), [1, 2]), call(real(3, 5), [0, 1], "constant", 2.0),
    call(real(2, 3, 5), [1, 1], "reflect"),
))
add(each("pad.default", call(real(2, 3, 5), [1, 1], mode="replicate", value=None), call(real(3, 2, 5), [0, 0, 1, 0])))
add(each("unfold.default", call(real(3, 7), 1, 3, 2), call(real(7, 3), 0, 2, 1), call(real(5, 3), -1, 2, 1)))
add(each("select.int", call(real(3, 5), 0, 1), call(real(3, 5), -1, -2), call(real(2, 3, 5), 1, 0)))
add(each("unbind.int", call(real(3, 5)), call(real(5, 3), 1), call(real(2, 3, 5), -2)))
SPLIT = call(real(3, 10), 5, 1), call(real(7, 3), 3), call(real(2, 10, 3), 4, -2)
add(each("split.Tensor", *SPLIT, call(real(3, 12), 4, dim=-1), call(real(3, 5), 1, 1)))
add(each(
    "split_with_sizes.default", call(real(3, 18), [6, 6, 6], 1), call(real(3, 20), [12, 4, 4], -1),
    call(real(5, 3), [2, 3]),
))
add(each("chunk.default", call(real(3, 10), 2, 1), call(real(7, 3), 3), call(real(3, 12), 3, dim=-1)))
add(each("tensor_split.sections", call(real(3, 10), 2, 1), call(real(7, 3), 3)))
CAT = (
    call([real(3, 5), real(3, 5)], 1),
    call([real(5, 3), real(2, 3)]),
    call([real(2, 6, 3), real(2, 3, 3), real(2, 3, 3)], -2),
)
add(each("cat.default concat.default concatenate.default", *CAT, call([real(3, 5), real(3, 1)], dim=-1)))
add(each(
    "stack.default", call([real(3, 5), real(3, 5)]), call([real(3, 5), real(3, 5), real(3, 5)], -1), call([real(5)], 0),
))

# cross-entropy, in pieces
MAXIMUM = real(5) + 2
LOGITS = real(5, 7)
TARGET = torch.tensor([0, 6, 3, -100, 4])
SAMPLES["autotp.losses.row_maximum"] = [call(LOGITS), call(real(3, 10))]
SAMPLES["autotp.losses.sum_exp"] = [call(LOGITS, MAXIMUM)]
SAMPLES["autotp.losses.pick"] = [call(LOGITS, TARGET), call(real(3, 10), integers(3, below=10))]
SAMPLES["autotp.losses.rows_of_loss"] = [call(positive(5), MAXIMUM, real(5), TARGET, -100, 7)]

# fmt: on
