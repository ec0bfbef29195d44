"""Sample calls of convolutions, and of the operators that stand around them."""

from __future__ import annotations

from typing import Any

from sampling import Sample, add, call, each, real
from torch import Tensor


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Sample:
    """A convolution; numbers hold for all dims of the kernel."""
    lists = [[value] * (weight.dim() - 2) if isinstance(value, int) else value for value in (stride, padding, dilation)]
    return call(x, weight, bias, *lists, groups)


def transposed(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any = 1, padding: int = 0, extra: int = 0, groups: int = 1
) -> Sample:
    """A transposed convolution; `extra` is the output's padding."""
    lists = [[value] * (weight.dim() - 2) if isinstance(value, int) else value for value in (stride, padding, extra)]
    return call(x, weight, bias, *lists, groups)


# fmt: off
add(each(
    "conv1d.default", call(real(3, 5, 7), real(4, 5, 3), real(4)), conv(real(2, 6, 9), real(4, 3, 3), real(4), 2, 1, 1, 2),
    call(real(3, 5, 7), real(6, 5, 1)), call(real(2, 3, 8), real(5, 3, 4), real(5), stride=[4]),
    conv(real(5, 7), real(3, 5, 3), None, 1, 1),
))
add(each(
    "conv2d.default", conv(real(3, 5, 6, 5), real(7, 5, 3, 2), real(7), [2, 1], [1, 0]),
    conv(real(2, 6, 4, 5), real(6, 1, 3, 3), real(6), 1, 1, 1, 6),  # depthwise
    conv(real(2, 6, 4, 4), real(12, 1, 3, 3), None, 1, 1, 1, 6),  # with a multiplier
    conv(real(2, 6, 4, 5), real(10, 3, 3, 3), real(10), 1, 2, 2, 2),  # grouped, dilated
    conv(real(2, 3, 6, 5), real(5, 3, 1, 1), real(5)), conv(real(2, 3, 6, 5), real(5, 3, 1, 1), None, 2),
    conv(real(2, 6, 4, 5), real(6, 3, 1, 1), real(6), 1, 0, 1, 2),
    conv(real(2, 3, 6, 10), real(5, 3, 2, 5), real(5), [2, 5]),  # patches
    conv(real(2, 3, 7, 10), real(5, 3, 2, 5), real(5), [2, 5]),  # patches that leave a row over
    conv(real(2, 3, 6, 6), real(5, 3, 2, 2), real(5), 2, 0, 2), call(real(3, 5, 4), real(7, 3, 2, 2), real(7)),
    call(real(3, 1, 4, 4), real(2, 1, 3, 3), real(2)),
))
add(each(
    "conv3d.default", conv(real(2, 3, 4, 3, 5), real(5, 3, 2, 2, 3), real(5), 1, [0, 1, 1]),
    conv(real(2, 4, 4, 4, 2), real(6, 2, 2, 1, 2), None, [2, 1, 2], 0, 1, 2),
))
add(each(
    "conv1d.padding", call(real(3, 5, 7), real(4, 5, 3), real(4), [1], "same"), call(real(3, 5, 7), real(6, 5, 1), None, [1], "same"),
    call(real(2, 6, 8), real(6, 3, 2), real(6), [2], "valid", [1], 2),
))
add(each(
    "conv2d.padding", call(real(2, 3, 5, 4), real(5, 3, 3, 1), real(5), [1], "same"),
    call(real(2, 5, 5, 4), real(5, 1, 3, 3), real(5), [1, 1], "same", [1, 1], 5),
))
add(each("conv3d.padding", call(real(2, 3, 3, 4, 2), real(5, 3, 3, 1, 1), real(5), padding="same")))
add(each(
    "conv_transpose1d.default", transposed(real(3, 5, 7), real(5, 4, 3), real(4), 2, 1, 1),
    transposed(real(2, 6, 5), real(6, 3, 3), real(6), 2, 0, 0, 2), transposed(real(2, 3, 5), real(3, 5, 4), real(5), 4),
    call(real(5, 7), real(5, 3, 1)),
))
add(each(
    "conv_transpose2d.input", call(real(2, 5, 4, 3), real(5, 7, 3, 2), real(7), [2, 1], [0, 0], [1, 0], 1, [2, 1]),
    transposed(real(2, 6, 3, 4), real(6, 1, 3, 3), real(6), 2, 1, 1, 6),
    transposed(real(2, 6, 3, 4), real(6, 5, 2, 2), real(10), 2, groups=2),
    transposed(real(2, 3, 3, 5), real(3, 5, 2, 2), real(5), 2), transposed(real(2, 3, 3, 5), real(3, 5, 2, 2), None, 2, 0, 1),
    call(real(2, 6, 3, 4), real(6, 5, 2, 2), None, [2, 2], [0, 0], [0, 0], 2, [2, 2]),
    transposed(real(6, 3, 4), real(6, 5, 2, 2), real(5), 2),
))
add(each(
    "conv_transpose3d.input", transposed(real(2, 3, 2, 3, 3), real(3, 5, 2, 2, 3), real(5), [2, 1, 2]),
    transposed(real(2, 4, 2, 2, 3), real(4, 3, 2, 1, 1), real(6), [2, 1, 1], groups=2),
))
add(each(
    "convolution.default", call(real(2, 6, 4, 5), real(10, 3, 3, 3), real(10), [1, 1], [1, 1], [1, 1], False, [0, 0], 2),
    call(real(2, 6, 4, 5), real(6, 5, 2, 2), None, [2, 2], [0, 0], [1, 1], True, [0, 0], 2),
    call(real(3, 5, 7), real(4, 5, 1), real(4), [1], [0], [1], False, [0], 1),
))
add(each(
    "_weight_norm.default", call(real(5, 3, 2), real(5, 1, 1)), call(real(3, 5, 7), real(1, 1, 7), 2), call(real(5, 7), real(5, 1), 0),
    call(real(3, 5), real(), -1),
))
add(each(
    "im2col.default", call(real(2, 5, 4, 5), [2, 3], [1, 1], [0, 0], [1, 1]), call(real(5, 4, 5), [2, 2], [1, 2], [1, 0], [2, 1]),
))
add(each(
    "col2im.default", call(real(2, 30, 9), [4, 5], [2, 3], [1, 1], [0, 0], [1, 1]),
    call(real(20, 6), [4, 4], [2, 2], [1, 1], [0, 0], [1, 2]),
))
add(each("pixel_shuffle.default", call(real(2, 12, 3, 5), 2), call(real(8, 2, 3), 2), call(real(2, 3, 9, 2, 2), 3)))
add(each("pixel_unshuffle.default", call(real(2, 3, 6, 4), 2), call(real(5, 4, 2), 2), call(real(2, 2, 3, 6), 3)))
add(each("channel_shuffle.default", call(real(3, 10, 4), 2), call(real(2, 6, 3, 2), 3)))
# fmt: on
