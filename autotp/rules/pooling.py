"""Pooling, resampling and padding by copies: places stay whole, batch and channels are free."""

from __future__ import annotations

from typing import Any

from autotp.rules.empty import unless_empty
from autotp.rules.language import Call, Local, Rule, bind
from autotp.rules.registry import rule_for


def _windows(call: Call, dims: int, *, linear: bool) -> Rule:
    """The last `dims` dims of the first operand change; other operands are laid out like the outputs."""
    source, result = (" ".join(f"{letter}{i}^" for i in range(dims)) for letter in "st")
    outputs = ", ".join([f"... {result}"] * len(call.outputs))
    return bind(f"... {source} -> {outputs}", call, linear=((0,),) if linear else (), local=unless_empty)


def _dims(call: Call) -> int:
    """3 for `aten.avg_pool3d.default`."""
    return next(int(letter) for letter in call.op if letter.isdigit())


@rule_for("""
    aten.max_pool1d.default aten.max_pool2d.default aten.max_pool3d.default
    aten.max_pool1d_with_indices.default aten.max_pool2d_with_indices.default aten.max_pool3d_with_indices.default
    aten.adaptive_max_pool1d.default aten.adaptive_max_pool2d.default aten.adaptive_max_pool3d.default
""")
def max_pool(call: Call) -> Rule:
    """Maxima of windows; indices count places within one channel of one row."""
    return _windows(call, _dims(call), linear=False)


@rule_for("""
    aten.avg_pool1d.default aten.avg_pool2d.default aten.avg_pool3d.default
    aten.adaptive_avg_pool1d.default aten.adaptive_avg_pool2d.default aten.adaptive_avg_pool3d.default
    aten._adaptive_avg_pool2d.default aten._adaptive_avg_pool3d.default
""")
def average_pool(call: Call) -> Rule:
    """Means of windows."""
    return _windows(call, _dims(call), linear=True)


@rule_for("aten.max_unpool2d.default aten.max_unpool3d.default")
def max_unpool(call: Call) -> Rule:
    """Values put where their maxima came from: the indices count places within one channel."""
    dims = _dims(call)
    source, result = (" ".join(f"{letter}{i}^" for i in range(dims)) for letter in "st")
    return bind(f"... {source}, ... {source} -> ... {result}", call, linear=((0,),), local=unless_empty)


@rule_for("""
    aten.upsample_nearest1d.vec aten.upsample_nearest2d.vec aten.upsample_nearest3d.vec
    aten.upsample_nearest1d.default aten.upsample_nearest2d.default aten.upsample_nearest3d.default
    aten._upsample_nearest_exact1d.vec aten._upsample_nearest_exact2d.vec aten._upsample_nearest_exact3d.vec
    aten._upsample_nearest_exact1d.default aten._upsample_nearest_exact2d.default aten._upsample_nearest_exact3d.default
    aten.upsample_linear1d.vec aten.upsample_bilinear2d.vec aten.upsample_trilinear3d.vec aten.upsample_bicubic2d.vec
    aten.upsample_linear1d.default aten.upsample_bilinear2d.default aten.upsample_trilinear3d.default
    aten.upsample_bicubic2d.default aten._upsample_bilinear2d_aa.vec aten._upsample_bilinear2d_aa.default
    aten._upsample_bicubic2d_aa.vec aten._upsample_bicubic2d_aa.default
""")
def upsample(call: Call) -> Rule:
    """Interpolation is linear in the values, whatever its order."""
    return _windows(call, _dims(call), linear=True)


@rule_for("""
    aten.reflection_pad1d.default aten.reflection_pad2d.default aten.reflection_pad3d.default
    aten.replication_pad1d.default aten.replication_pad2d.default aten.replication_pad3d.default
""")
def mirror_pad(call: Call) -> Rule:
    """Places beyond the border are copies of others."""
    return _windows(call, _dims(call), linear=True)


@rule_for("aten.grid_sampler.default aten.grid_sampler_2d.default aten.grid_sampler_3d.default")
def grid_sampler(call: Call) -> Rule:
    """Values at given places: the places of the output are free."""
    dims = len(call.tensors[0].shape) - 2
    source, result = (" ".join(f"{letter}{i}{mark}" for i in range(dims)) for letter, mark in (("s", "^"), ("t", "")))
    return bind(f"n c {source}, n {result} x^ -> n c {result}", call, linear=((0,),), local=unless_empty)


def _local_affine_grid(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    rows = local.output_shape()[0]
    size = [rows, *local.call.args[1][1:]]
    return unless_empty(Local(local.call, local.target, (local.args[0], size, *local.args[2:]), {}, local.operands, local.outputs))


@rule_for("aten.affine_grid_generator.default")
def affine_grid(call: Call) -> Rule:
    """One grid of places for each map in the batch."""
    places = " ".join(f"t{i}^" for i in range(len(call.outputs[0].shape) - 2))
    return bind(f"n x^ y^ -> n {places} x^", call, linear=((0,),), local=_local_affine_grid)
