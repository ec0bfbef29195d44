"""Elementwise operators: every dim is a factor; size-1 dims broadcast."""

from __future__ import annotations

from autotp.rules.language import Call, Rule, bind
from autotp.rules.registry import rule_for


def _elementwise(call: Call, linear: tuple[tuple[int, ...], ...] = ()) -> Rule:
    operands = ", ".join(["..."] * len(call.operands))
    return bind(f"{operands} -> ...", call, linear=linear)


@rule_for("""
    aten.abs.default aten.acos.default aten.acosh.default aten.angle.default aten.asin.default aten.asinh.default
    aten.atan.default aten.atanh.default aten.bitwise_not.default aten.ceil.default aten.celu.default aten.clamp.default
    aten.clamp.Tensor aten.clamp_max.default aten.clamp_max.Tensor aten.clamp_min.default aten.clamp_min.Tensor aten.cos.default
    aten.cosh.default aten.digamma.default aten.elu.default aten.erf.default aten.erfc.default aten.erfinv.default
    aten.exp.default aten.exp2.default aten.expm1.default aten.floor.default aten.frac.default aten.gelu.default
    aten.hardshrink.default aten.hardsigmoid.default aten.hardswish.default aten.hardtanh.default aten.i0.default
    aten.isinf.default aten.isnan.default aten.isneginf.default aten.isposinf.default aten.leaky_relu.default
    aten.lgamma.default aten.log.default aten.log10.default aten.log1p.default aten.log2.default aten.log_sigmoid.default
    aten.logical_not.default aten.logit.default aten.mish.default aten.mvlgamma.default aten.nan_to_num.default
    aten.polygamma.default aten.reciprocal.default aten.relu.default aten.relu6.default aten.round.decimals
    aten.round.default aten.rsqrt.default aten.selu.default aten.sgn.default aten.sigmoid.default aten.sign.default
    aten.signbit.default aten.silu.default aten.sin.default aten.sinc.default aten.sinh.default aten.softplus.default
    aten.softshrink.default aten.special_bessel_j0.default aten.special_bessel_j1.default aten.special_entr.default
    aten.special_erfcx.default aten.special_i0e.default aten.special_i1.default aten.special_i1e.default
    aten.special_log_ndtr.default aten.special_ndtr.default aten.special_ndtri.default aten.sqrt.default aten.square.default
    aten.tan.default aten.tanh.default aten.threshold.default aten.trunc.default
    aten.pow.Tensor_Scalar aten.pow.Scalar aten.pow.Tensor_Tensor aten.remainder.Scalar aten.remainder.Scalar_Tensor
    aten.remainder.Tensor aten.fmod.Scalar aten.fmod.Tensor aten.copysign.Scalar aten.copysign.Tensor
    aten.eq.Scalar aten.eq.Tensor aten.ne.Scalar aten.ne.Tensor aten.lt.Scalar aten.lt.Tensor aten.le.Scalar aten.le.Tensor
    aten.gt.Scalar aten.gt.Tensor aten.ge.Scalar aten.ge.Tensor
    aten.__and__.Tensor aten.__or__.Tensor aten.__xor__.Tensor aten.__and__.Scalar aten.__or__.Scalar aten.__xor__.Scalar
    aten.bitwise_and.Tensor aten.bitwise_or.Tensor aten.bitwise_xor.Tensor aten.bitwise_and.Scalar aten.bitwise_or.Scalar
    aten.bitwise_xor.Scalar aten.bitwise_left_shift.Tensor aten.bitwise_left_shift.Tensor_Scalar
    aten.bitwise_right_shift.Tensor aten.bitwise_right_shift.Tensor_Scalar aten.__lshift__.Scalar aten.__lshift__.Tensor
    aten.__rshift__.Scalar aten.__rshift__.Tensor aten.logical_and.default aten.logical_or.default aten.logical_xor.default
    aten.max.other aten.min.other aten.maximum.default aten.minimum.default aten.fmax.default aten.fmin.default
    aten.floor_divide.default aten.floor_divide.Scalar aten.rsub.Scalar aten.atan2.default aten.polar.default
    aten.hypot.default aten.logaddexp.default aten.logaddexp2.default aten.xlogy.Tensor aten.xlogy.Scalar_Other
    aten.xlogy.Scalar_Self aten.special_xlog1py.default aten.heaviside.default aten.igamma.default aten.igammac.default
    aten.special_zeta.default aten.nextafter.default aten.gcd.default aten.lcm.default
""")
def nonlinear(call: Call) -> Rule:
    """Operators without a linear operand: a partial input must be reduced first."""
    return _elementwise(call)


@rule_for("""
    aten.neg.default aten.real.default aten.detach.default aten.deg2rad.default aten.rad2deg.default aten._conj.default
    aten.conj_physical.default aten._conj_physical.default
""")
def linear(call: Call) -> Rule:
    """Operators that are linear in their only operand."""
    return _elementwise(call, ((0,),))


@rule_for("aten.to.dtype")
def cast(call: Call) -> Rule:
    """Casts are linear between floating-point types only."""
    source, target = call.tensors[0].dtype, call.outputs[0].dtype
    both_floating = source.is_floating_point and target.is_floating_point
    return _elementwise(call, ((0,),) if both_floating else ())


@rule_for("aten.add.Tensor aten.sub.Tensor aten.rsub.Tensor aten.add.Scalar aten.sub.Scalar aten.complex.default")
def add(call: Call) -> Rule:
    """Linear in both operands together; adding a scalar is not linear."""
    return _elementwise(call, ((0, 1),) if len(call.tensors) == 2 else ())


@rule_for("aten.mul.Tensor aten.mul.Scalar aten.multiply.Tensor")
def mul(call: Call) -> Rule:
    """Linear in each operand while the other is replicated."""
    return _elementwise(call, tuple((index,) for index in range(len(call.tensors))))


@rule_for("aten.div.Tensor aten.div.Scalar")
def div(call: Call) -> Rule:
    """Linear in the numerator."""
    return _elementwise(call, ((0,),))


@rule_for("aten.div.Tensor_mode aten.div.Scalar_mode")
def div_rounded(call: Call) -> Rule:
    """Rounded division is not linear."""
    return _elementwise(call)


@rule_for("aten.where.self aten.where.ScalarOther aten.where.ScalarSelf aten.where.Scalar")
def where(call: Call) -> Rule:
    """Linear in the two choices together; a scalar choice keeps it linear only if it is zero."""
    scalars = [value for value in call.args[1:] if isinstance(value, (int, float))]
    branches = tuple(range(1, len(call.operands)))
    return _elementwise(call, (branches,) if branches and not any(scalars) else ())


@rule_for("aten.masked_fill.Scalar aten.masked_fill.Tensor")
def masked_fill(call: Call) -> Rule:
    """Linear in the tensor if the fill value is the number zero."""
    return _elementwise(call, ((0,),) if call.argument(2, "value") == 0 and len(call.operands) == 2 else ())


@rule_for("aten.addcmul.default")
def addcmul(call: Call) -> Rule:
    """x + value · a · b."""
    return _elementwise(call, ((0, 1), (0, 2)))


@rule_for("aten.addcdiv.default")
def addcdiv(call: Call) -> Rule:
    """x + value · a / b."""
    return _elementwise(call, ((0, 1),))


@rule_for("aten.lerp.Scalar aten.lerp.Tensor")
def lerp(call: Call) -> Rule:
    """Linear in both ends together."""
    return _elementwise(call, ((0, 1),))


@rule_for("aten.prelu.default")
def prelu(call: Call) -> Rule:
    """One slope, or one for each channel (dim 1)."""
    dims = [f"d{i}" for i in range(len(call.tensors[0].shape))]
    slope = " ".join([*dims[1:2], "1"][: len(call.tensors[1].shape)])
    return bind(f"{' '.join(dims)}, {slope} -> {' '.join(dims)}", call)


@rule_for("aten.glu.default")
def glu(call: Call) -> Rule:
    """The gated dim is (half, element): a rank holds the same elements of both halves."""
    rank = len(call.outputs[0].shape)
    dim = call.argument(1, "dim", -1) % rank
    left = " ".join(f"(n^ d{i})" if i == dim else f"d{i}" for i in range(rank))
    return bind(f"{left} -> {' '.join(f'd{i}' for i in range(rank))}", call, sizes={"n": 2})
