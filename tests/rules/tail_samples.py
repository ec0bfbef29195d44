"""Sample calls of less common operators: elementwise, reductions, creation, random numbers."""

from __future__ import annotations

import torch
from sampling import add, booleans, call, each, integers, positive, real

SMOOTH = """
    angle.default asinh.default frac.default hardshrink.default i0.default sgn.default signbit.default sinc.default
    softshrink.default special_bessel_j0.default special_bessel_j1.default special_erfcx.default special_i0e.default
    special_i1.default special_i1e.default special_log_ndtr.default special_ndtr.default isneginf.default isposinf.default
    deg2rad.default rad2deg.default
"""
WITHOUT_GRADIENT = ("special_bessel_j0.default", "special_bessel_j1.default")
PROBABILITY = """
    asin.default atanh.default digamma.default lgamma.default logit.default special_entr.default special_ndtri.default
"""
TWO = """
    hypot.default logaddexp.default logaddexp2.default fmax.default fmin.default fmod.Tensor copysign.Tensor rsub.Tensor
"""
SHIFTS = "bitwise_left_shift bitwise_right_shift"

# fmt: off
# elementwise
for name in SMOOTH.split():
    gradient = {} if name not in WITHOUT_GRADIENT else {"gradient": False}
    add(each(name, call(real(3, 5), **gradient), call(real(7), **gradient)))
add(each(PROBABILITY, call(positive(3, 5)), call(positive(7))))
add(each("acosh.default", call(positive(3, 5) + 1)))
add(each("round.decimals", call(real(3, 5), decimals=1)))
add(each("mvlgamma.default", call(positive(3, 5) + 2, 2)))
add(each("polygamma.default", call(1, positive(3, 5))))
add(each(TWO, call(real(3, 5), real(3, 5)), call(real(2, 1, 5), real(3, 1))))
add(each("clamp_min.Tensor clamp_max.Tensor", call(real(3, 5), real(3, 5)), call(real(3, 5), real(5))))
add(each("fmod.Scalar", call(real(3, 5), 0.7)))
add(each("copysign.Scalar", call(real(3, 5), -1.0)))
add(each("remainder.Scalar_Tensor", call(2.5, integers(3, 5) + 1)))
add(each("xlogy.Tensor special_xlog1py.default", call(real(3, 5), positive(5)), call(real(7), positive(7))))
add(each("xlogy.Scalar_Other", call(real(3, 5), 0.4)))
add(each("xlogy.Scalar_Self", call(0.4, positive(3, 5))))
add(each("heaviside.default nextafter.default", call(real(3, 5), real(5), gradient=False)))
add(each("igamma.default igammac.default", call(positive(3, 5), positive(5), gradient=False)))
add(each("special_zeta.default", call(positive(3, 5) + 1, positive(5), gradient=False)))
add(each("gcd.default lcm.default __lshift__.Tensor __rshift__.Tensor bitwise_xor.Tensor", call(integers(3, 5), integers(5))))
add(each(f"{SHIFTS.replace(' ', '.Tensor ')}.Tensor", call(integers(3, 5), integers(5))))
add(each(f"{SHIFTS.replace(' ', '.Tensor_Scalar ')}.Tensor_Scalar", call(integers(3, 5), 2)))
add(each("__lshift__.Scalar __rshift__.Scalar __xor__.Scalar bitwise_xor.Scalar", call(integers(3, 5), 2)))
add(each("div.Scalar_mode", call(real(3, 5), 0.3, rounding_mode="floor")))
add(each("floor_divide.Scalar", call(real(3, 5), 0.3, gradient=False)))
add(each("addcdiv.default", call(real(3, 5), real(3, 5), positive(5)), call(real(5), real(3, 1), positive(3, 5), value=0.5)))
add(each("lerp.Tensor", call(real(3, 5), real(3, 5), real(3, 5)), call(real(3, 5), real(5), real())))
add(each("complex.default", call(real(3, 5), real(3, 5))))
COMPLEX = torch.complex(real(3, 5), real(3, 5))
add(each("_conj.default conj_physical.default _conj_physical.default angle.default sgn.default", call(COMPLEX)))

# reductions
ONE_DIM = call(real(3, 5), 1), call(real(3, 5), 0, True), call(real(2, 5, 3), -2)
add(each("median.dim nanmedian.dim mode.default", *ONE_DIM))
add(each("mode.default", call(real(3, 5))))
add(each("kthvalue.default", call(real(3, 5), 2), call(real(5, 3), 2, 0, True)))
add(each("any.dims all.dims", call(booleans(3, 5), [1]), call(booleans(2, 3, 5), [0, 2], True), call(booleans(3, 5))))
add(each("aminmax.default", call(real(3, 5), dim=1), call(real(5, 3), dim=0, keepdim=True), call(real(3, 5))))
add(each(
    "var_mean.correction std_mean.correction", call(real(3, 5), [1]), call(real(3, 5), [0], correction=0, keepdim=True),
    call(real(3, 5), None, correction=1),
))
add(each("amax.default", call(real(3, 5), [1], gradient=False), call(integers(7), [0]), call(booleans(3, 5), [0, 1], True)))
add(each("nansum.default", call(real(3, 5), [1]), call(torch.where(booleans(3, 5), real(3, 5), torch.nan), [0], True), call(real(3, 5))))
add(each("count_nonzero.default", call(integers(3, 5)), call(integers(3, 5), 1)))
add(each("count_nonzero.dim_IntList", call(integers(3, 5), [0]), call(integers(2, 3, 5), [0, -1])))
add(each("cummax.default cummin.default", call(real(3, 5), 1), call(real(5, 3), 0), call(real(2, 3, 5), -2)))
add(each("sort.stable", call(real(3, 5), stable=True), call(real(5, 3), stable=True, dim=0, descending=True)))
add(each("argsort.default", call(real(3, 5)), call(real(5, 3), 0, True)))
add(each("argsort.stable", call(real(3, 5), stable=True), call(real(5, 3), stable=True, dim=0)))
add(each("renorm.default", call(real(3, 5), 2, 0, 1.0), call(real(3, 5, 2), 1, 1, 1.0)))
add(each("_cdist_forward.default", call(real(5, 3), real(7, 3), 2.0, None), call(real(2, 5, 3), real(2, 7, 3), 1.0, None)))
add(each("_euclidean_dist.default", call(real(5, 3), real(7, 3))))
add(each("linalg_cross.default", call(real(5, 3), real(5, 3)), call(real(3, 5), real(3, 1), dim=0)))
add(each(
    "_fft_c2c.default", call(torch.complex(real(3, 5), real(3, 5)), [1], 0, True),
    call(torch.complex(real(3, 5, 4), real(3, 5, 4)), [0, 2], 2, False),
))
add(each("_fft_r2c.default", call(real(3, 8), [1], 0, True), call(real(8, 5), [0], 0, False)))
add(each("_fft_c2r.default", call(torch.complex(real(3, 5), real(3, 5)), [1], 0, 8)))

WINDOW = torch.hann_window(8, dtype=torch.float64)
add(each("stft.default", call(real(3, 20), 8, 4, None, WINDOW, return_complex=True), call(real(20), 8, return_complex=True)))
add(each("stft.center", call(real(3, 20), 8, return_complex=True)))

# creation and random numbers
NUMBER = {"dtype": torch.float64, "gradient": False}
add(each("full.default", call([3, 5], 2.0, **NUMBER), call([7], True, dtype=torch.bool, gradient=False), call([], 1.0, **NUMBER)))
add(each("zeros.default ones.default rand.default randn.default empty.memory_format", call([3, 5], **NUMBER)))
add(each("randint.default", call(4, [3, 5], gradient=False)))
add(each("randint.low", call(2, 4, [3, 5], gradient=False)))
add(each("normal.float_float", call(0.0, 1.0, [3, 5], **NUMBER)))
add(each("fill.Scalar", call(real(3, 5), 2.0)))
add(each("zero.default", call(real(3, 5))))
add(each("randint_like.default", call(real(3, 5), 4, gradient=False)))
add(each("randint_like.low_dtype", call(real(3, 5), 2, 4, gradient=False)))
add(each("exponential.default uniform.default poisson.default cauchy.default", call(positive(3, 5))))
add(each("normal_functional.default", call(positive(3, 5), gradient=False)))
add(each("log_normal.default", call(positive(3, 5))))
add(each("bernoulli.p", call(positive(3, 5), 0.4, gradient=False)))
add(each("normal.Tensor_float", call(real(3, 5), 0.3)))
add(each("normal.float_Tensor", call(0.3, positive(3, 5))))
add(each("normal.Tensor_Tensor", call(positive(3, 5), positive(3, 5))))
add(each("binomial.default", call(torch.full((3, 5), 4.0, dtype=torch.float64), positive(3, 5), gradient=False)))
add(each("multinomial.default", call(positive(3, 5), 2, gradient=False), call(positive(5), 2, True, gradient=False)))
# fmt: on
