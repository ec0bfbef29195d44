"""Meshes and border layouts as users write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from math import prod
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from autotp import _torch
from autotp.errors import AutotpError
from autotp.layouts import Layout, Split, plain_cut, simplify_cut, uniform
from autotp.program import Program, Ref

AXES = {1: ("tp",), 2: ("dp", "tp"), 3: ("dp", "cp", "tp")}
"""Names of the axes of a mesh that is given by its sizes alone."""


def parse_mesh(mesh: int | Sequence[int] | Mapping[str, int] | DeviceMesh | str) -> dict[str, int]:
    """Axis name → size, outermost first.

    Args:
        mesh: `8`, `(2, 4)`, `{"dp": 2, "tp": 4}`, a `DeviceMesh`, or such as text: `8`, `2x4`, `dp=2,tp=4`.

    Raises:
        AutotpError: it is none of these, or a size is below 1.
    """
    if isinstance(mesh, str):
        mesh = _parse_text(mesh)
    if not isinstance(mesh, (int, DeviceMesh, Mapping, list, tuple)):
        raise AutotpError(f"the mesh {mesh!r} is not understood: write 8, (2, 4), {{'dp': 2, 'tp': 4}} or pass a DeviceMesh")
    if isinstance(mesh, DeviceMesh):
        sizes: Sequence[int] = tuple(mesh.shape)
        axes = dict(zip(mesh.mesh_dim_names or _names(len(sizes)), sizes, strict=True))
    elif isinstance(mesh, Mapping):
        axes = dict(mesh)
    else:
        sizes = (mesh,) if isinstance(mesh, int) else tuple(mesh)
        axes = dict(zip(_names(len(sizes)), sizes, strict=True))
    if not axes or any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in axes.values()):
        raise AutotpError(f"the mesh {mesh!r} needs whole sizes of at least 1, as in 8, 2x4 or dp=2,tp=4")
    return axes


def _parse_text(text: str) -> int | tuple[int, ...] | dict[str, int]:
    try:
        if "=" in text:
            pairs = [part.split("=") for part in text.split(",")]
            axes = {name.strip(): int(size) for name, size in pairs}
            if len(axes) < len(pairs) or not all(name.isidentifier() for name in axes):
                raise ValueError
            return axes
        return tuple(int(size) for size in text.lower().split("x"))
    except ValueError:
        raise AutotpError(f"the mesh {text!r} is not understood: write 8, 2x4 or dp=2,tp=4") from None


def _names(count: int) -> tuple[str, ...]:
    return AXES.get(count) or tuple(f"axis{number}" for number in range(count))


def output_names(program: Program) -> tuple[str, ...]:
    """A name for each leaf of the model's output: the keys on the way to it, or its number; `output` if it is alone."""
    names: dict[int, str] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, Mapping):
            parts = list(value.items())
        elif isinstance(value, (list, tuple)):
            parts = list(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
        elif is_dataclass(value) and not isinstance(value, type):
            parts = [(item.name, getattr(value, item.name)) for item in fields(value)]
        else:
            if isinstance(value, int):
                names.setdefault(value, path or "output")
            return
        for key, part in parts:
            walk(part, f"{path}.{key}" if path else str(key))

    count = program.out_spec.num_leaves
    walk(_torch.tree_unflatten(list(range(count)), program.out_spec), "")
    return tuple(names.get(leaf, f"output {leaf}") for leaf in range(count))


Declaration = Mapping[str, Any] | Sequence[Any] | Any


def border_layouts(
    program: Program, axes: Mapping[str, int], inputs: Mapping[str, Declaration] | None, outputs: Mapping[str, Declaration] | None
) -> tuple[dict[int, Layout], dict[int, Layout]]:
    """The declared layouts: by input node, and by output position.

    A declaration is `{axis: dim}` with `"partial"` in place of a dim for an output that is a summand, or one DTensor
    placement per mesh axis.

    Raises:
        AutotpError: an unknown tensor, axis or dim; a partial input; a tensor that cannot be declared.
    """
    for what, declared in (("inputs", inputs), ("outputs", outputs)):
        if declared is not None and not isinstance(declared, Mapping):
            raise AutotpError(f"{what} is {declared!r}; write a dict from tensor names to layouts, e.g. {{'input_ids': {{'dp': 0}}}}")
    given: dict[int, Layout] = {}
    nodes = [node for node in program.nodes if node.kind == "input"]
    for name, declaration in (inputs or {}).items():
        node = next((node for node in nodes if node.target == name), None)
        if node is None:
            raise AutotpError(_unknown("inputs", name, [str(node.target) for node in nodes]))
        given[node.index] = _layout(f"inputs[{name!r}]", declaration, program, Ref(node.index), axes)
        if "P" in given[node.index].kinds:
            raise AutotpError(f"inputs[{name!r}] is declared partial; an input can be whole or split")
    names = output_names(program)
    left: dict[int, Layout] = {}
    for name, declaration in (outputs or {}).items():
        if str(name) not in names:
            raise AutotpError(_unknown("outputs", name, list(names)))
        position = names.index(str(name))
        ref = program.outputs[position]
        if not isinstance(ref, Ref):
            raise AutotpError(f"outputs[{name!r}] is {ref!r} and no tensor: it has no layout")
        left[position] = _layout(f"outputs[{name!r}]", declaration, program, ref, axes)
    return given, left


def _unknown(what: str, name: str, known: list[str]) -> str:
    near = get_close_matches(str(name), known, 1)
    hint = f"; did you mean {near[0]!r}? It has" if near else "; it has"
    return f"{what} declares {name!r}, which the model does not have{hint} {', '.join(known)}"


def _layout(where: str, declaration: Declaration, program: Program, ref: Ref, axes: Mapping[str, int]) -> Layout:
    shape = program.type_of(ref).shape
    places = _by_axis(where, declaration, axes)
    kinds = ["I"] * len(axes)
    dims: dict[int, list[int]] = {}
    for axis, name in enumerate(axes):
        place = places.get(name)
        if place is None or isinstance(place, Replicate):
            continue
        if place == "partial" or isinstance(place, Partial):
            kinds[axis] = "P"
            continue
        dim = place.dim if isinstance(place, Shard) else place
        if not isinstance(dim, int) or isinstance(dim, bool) or not -len(shape) <= dim < len(shape):
            raise AutotpError(f"{where} splits dim {dim!r} over {name}, but the tensor has {len(shape)} dims")
        kinds[axis] = "S"
        dims.setdefault(dim % len(shape), []).append(axis)
    parts = prod(axes.values())
    splits = tuple(Split(dim, tuple(on), simplify_cut(plain_cut(shape[dim]), parts)) for dim, on in sorted(dims.items()))
    return Layout(tuple(kinds), splits) if kinds.count("I") < len(kinds) else uniform("I", len(kinds))


def _by_axis(where: str, declaration: Declaration, axes: Mapping[str, int]) -> dict[str, Any]:
    if isinstance(declaration, Mapping):
        unknown = [name for name in declaration if name not in axes]
        if unknown:
            raise AutotpError(f"{where} names the mesh axis {unknown[0]!r}; the mesh has {', '.join(axes)}")
        return dict(declaration)
    if isinstance(declaration, Placement):
        declaration = [declaration]
    if isinstance(declaration, (list, tuple)) and len(declaration) == len(axes) and all(isinstance(p, Placement) for p in declaration):
        return dict(zip(axes, declaration, strict=True))
    raise AutotpError(f"{where} is {declaration!r}; write {{axis: dim}}, e.g. {{{next(iter(axes))!r}: 0}}, or one placement per mesh axis")
