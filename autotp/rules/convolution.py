"""Convolutions, plain and transposed, in one to three dims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from autotp.program import Size
from autotp.rules.empty import unless_empty, zeros
from autotp.rules.language import Call, Local, Rule, bind, exact_quotient
from autotp.rules.registry import rule_for

PLAIN: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
TRANSPOSED: dict[str, Any] = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
GENERAL: dict[str, Any] = {
    "stride": 1, "padding": 0, "dilation": 1, "transposed": False, "output_padding": 0, "groups": 1,
}  # fmt: skip

PER_DIM = ("stride", "padding", "output_padding", "dilation")


@dataclass(frozen=True)
class _Settings:
    """What follows input, weight and bias, by name and in the operator's order."""

    values: dict[str, Any]
    transposed: bool
    dims: int
    """How many dims the kernel has."""

    def of(self, name: str, dim: int) -> Any:
        """A setting for one dim of the kernel."""
        value = self.values.get(name, 0)
        if isinstance(value, (list, tuple)):
            return value[dim if len(value) > 1 else 0]
        return value


def settings_of(call: Call) -> _Settings:
    """The settings of a call, defaults filled in."""
    names = GENERAL if call.op == "aten.convolution.default" else TRANSPOSED if "transpose" in call.op else PLAIN
    names = {**names, "padding": "valid"} if call.op.endswith(".padding") else names  # in words there
    values = {name: call.argument(3 + place, name, default) for place, (name, default) in enumerate(names.items())}
    transposed, dims = "transpose" in call.op or bool(values.get("transposed")), len(call.tensors[1].shape) - 2
    values = {name: [value] * dims if name in PER_DIM and isinstance(value, int) else value for name, value in values.items()}
    return _Settings(values, transposed, dims)


@rule_for("""
    aten.conv1d.default aten.conv2d.default aten.conv3d.default aten.conv1d.padding aten.conv2d.padding aten.conv3d.padding
    aten.conv_transpose1d.default aten.conv_transpose2d.input aten.conv_transpose3d.input aten.convolution.default
""")
def convolution(call: Call) -> Rule:
    """A product over input channels `i`, of places that the kernel makes neighbours; channels come in groups `g`.

    Places stay whole, except along a dim that is cut into blocks of as many places as a stride, which kernels do not leave (patches;
    a kernel of size 1).
    """
    settings = settings_of(call)
    places = [_places(call, settings, dim) for dim in range(settings.dims)]
    source, kernel, result = (" ".join(names) for names in zip(*places, strict=True))
    groups = settings.values["groups"]
    i, o, other = "i", "o", "o" if settings.transposed else "i"
    if groups != 1:
        channels = call.tensors[0].shape[-settings.dims - 1], call.outputs[0].shape[-settings.dims - 1]
        known = all(exact_quotient(size, groups) is not None for size in channels)
        i, o, other = ("(g i)", "(g o)", other) if known else ("i^", "o^", "each^")
    weight = f"{i} {other}" if settings.transposed else f"{o} {other}"
    batch = "n " if len(call.tensors[0].shape) == settings.dims + 2 else ""
    depth: Size = call.tensors[1].shape[1]
    return bind(
        f"{batch}{i} {source}, {weight} {kernel}, +{o} -> {batch}{o} {result}",
        call,
        sizes={"g": groups, **{f"j{dim}": settings.of("stride", dim) for dim in range(settings.dims)}},
        linear=((0, 2), (1, 2)),
        work="memory" if groups != 1 and depth == 1 else "convolution",  # depthwise: too little arithmetic to be a product
        local=_local_convolution,
    )


def _places(call: Call, settings: _Settings, dim: int) -> tuple[str, str, str]:
    """What one spatial dim of input, kernel and output is made of: `s` blocks of `j` places each, if kernels keep to their block."""
    x, weight, out = call.tensors[0], call.tensors[1], call.outputs[0]
    coarse, fine = (x, out) if settings.transposed else (out, x)
    few, many = (tensor.shape[dim - settings.dims] for tensor in (coarse, fine))
    size, stride, padding = weight.shape[2 + dim], settings.of("stride", dim), settings.of("padding", dim)
    unpadded = padding in (0, "valid") or (padding == "same" and size == 1)
    within = isinstance(size, int) and (size - 1) * settings.of("dilation", dim) < stride
    if not (unpadded and within and many == few * stride):
        return f"s{dim}^", f"k{dim}^", f"t{dim}^"
    one, block = f"s{dim}", f"(s{dim} j{dim}^)"
    return (one, f"k{dim}^", block) if settings.transposed else (block, f"k{dim}^", one)


def _local_convolution(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    if not any(layout is not None and layout.splits for layout in local.operands):
        return local.target, local.args, local.kwargs
    settings = settings_of(local.call)
    (x, _), channel = local.call.tensors[:2], -settings.dims - 1
    of_x = local.operand_split(0, len(x.shape) + channel)
    of_result = local.outputs[0].split_at(len(x.shape) + channel)
    by_group = of_x is not None and of_result is not None and local.operand_split(1, 1) is None  # all have groups alone
    bias = local.args[2] if len(local.args) > 2 else local.kwargs.get("bias")
    values = {**settings.values, "groups": None}.values()
    channels = x.shape[channel] if by_group else None
    fixed = (local.target, local.output_shape(), settings.values["groups"], channels)
    return convolution_of_piece, (*fixed, *local.args[:2], bias, *values), {}


def convolution_of_piece(
    operator: Callable[..., Tensor],
    shape: Sequence[int],
    groups: int,
    channels: int | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *settings: Any,
) -> Tensor:
    """A convolution of one rank's pieces, giving a tensor of `shape`.

    Args:
        groups, channels: of the unsplit call; channels are None if no groups are split.
        settings: what follows the bias; None stands for the number of groups that this rank holds.
    """
    if not (x.numel() and weight.numel()):
        nothing = zeros(shape, x.dtype, (x, weight))
        return nothing if bias is None else nothing + bias.view(-1, *[1] * (weight.dim() - 2))
    here = groups if channels is None else x.shape[1 - weight.dim()] * groups // channels
    return operator(x, weight, bias, *(here if setting is None else setting for setting in settings))


@rule_for("aten._weight_norm.default")
def weight_norm(call: Call) -> Rule:
    """v · g / ‖v‖: the norm is taken over all dims but one, which has a magnitude for each of its slices."""
    rank = len(call.tensors[0].shape)
    dim = call.argument(2, "dim", 0)
    names = " ".join(f"d{i}" if i == dim else f"d{i}^" for i in range(rank))
    magnitude = " ".join(names.split() if len(call.tensors[1].shape) else [])
    return bind(f"{names}, {magnitude} -> {names}", call, linear=((1,),), local=unless_empty)


@rule_for("aten.im2col.default")
def im2col(call: Call) -> Rule:
    """The blocks that a kernel slides over, as columns of (channel, place in the block)."""
    batch = "n " if len(call.tensors[0].shape) == 4 else ""
    return _columns(call, 1, f"{batch}c h^ w^ -> {batch}(c k^) l^")


@rule_for("aten.col2im.default")
def col2im(call: Call) -> Rule:
    """Columns of (channel, place in the block) added up where the blocks came from."""
    batch = "n " if len(call.tensors[0].shape) == 3 else ""
    return _columns(call, 2, f"{batch}(c k^) l^ -> {batch}c h^ w^")


def _columns(call: Call, position: int, pattern: str) -> Rule:
    """`k` counts the places of a block, whose size is the argument at `position`."""
    size = call.args[position]
    places = size**2 if isinstance(size, int) else size[0] * size[-1]
    return bind(pattern, call, sizes={"k": places}, linear=((0,),), local=unless_empty)


@rule_for("aten.pixel_shuffle.default")
def pixel_shuffle(call: Call) -> Rule:
    """Channels become places: (channel, row, column of a block)."""
    side = call.args[1]
    pattern = "... (c a^ b^) h w -> ... c (h a^) (w b^)"
    return bind(pattern, call, sizes={"a": side, "b": side}, linear=((0,),), local=unless_empty)


@rule_for("aten.pixel_unshuffle.default")
def pixel_unshuffle(call: Call) -> Rule:
    """Places become channels: (channel, row, column of a block)."""
    side = call.args[1]
    pattern = "... c (h a^) (w b^) -> ... (c a^ b^) h w"
    return bind(pattern, call, sizes={"a": side, "b": side}, linear=((0,),), local=unless_empty)


@rule_for("aten.channel_shuffle.default")
def channel_shuffle(call: Call) -> Rule:
    """(group, channel) becomes (channel, group); a rank holds the same channels of every group."""
    groups = call.args[1]
    return bind("n (g^ c) ... -> n (c g^) ...", call, sizes={"g": groups}, linear=((0,),), local=unless_empty)
