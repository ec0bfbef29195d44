"""Run a `Program` on one device, as a plain interpreter: the reference that everything else is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch

from autotp import _torch
from autotp.errors import AutotpError
from autotp.program import Program, Ref, map_refs


def run(
    program: Program,
    state: Mapping[str, torch.Tensor],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Evaluate a program, with gradients where its parameters and inputs ask for them.

    Args:
        program: any traced model.
        state: the value of every parameter and buffer by name; tied ones under their first name.
        args, kwargs: the model's inputs, in the form in which the example inputs were given.

    Returns:
        The model's output, in its own structure, and the new value of every buffer that the forward changes.

    Raises:
        AutotpError: inputs that do not fit the trace (another structure, shape or constant, or an operator that fails
            on them), or a missing entry of `state`.
    """
    leaves = flatten_inputs(program, args, kwargs)
    sizes = bind_sizes(program, leaves)
    values: list[Any] = []
    tensors = iter(leaf for index, leaf in enumerate(leaves) if index not in program.in_constants)

    def value(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            found = values[leaf.node]
            return found[leaf.output] if isinstance(found, (tuple, list)) else found
        return evaluate(leaf, sizes)

    for node in program.nodes:
        if node.kind == "op":
            arguments, options = map_refs(node.args, value), map_refs(node.kwargs, value)
            try:
                values.append(node.target(*arguments, **options))
            except (RuntimeError, IndexError, ValueError) as error:
                raise AutotpError(
                    f"`{node.op}` in module `{node.path or '(root)'}` ({node.source}) fails for these inputs: "
                    f"{str(error).partition(chr(10))[0]}; call the model with sizes and values that it supports."
                ) from error
        elif node.kind == "input":
            values.append(next(tensors))
        elif node.kind == "constant":
            values.append(program.constants[node.target])
        elif node.target in state:
            values.append(state[node.target])
        else:
            raise AutotpError(f"the {node.kind} `{node.target}` has no value; pass it in `state`.")
    outputs = [map_refs(leaf, value) for leaf in program.outputs]
    return _torch.tree_unflatten(outputs, program.out_spec), {name: value(ref) for name, ref in program.updates}


def flatten_inputs(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> list[Any]:
    """The leaves of the inputs in the order of `program.in_names`; keyword arguments may come in any order.

    Raises:
        AutotpError: another structure than the trace's, or another value for an input that is not a tensor.
    """
    kwargs = dict(kwargs or {})
    expected = program.in_spec.child(1).context
    ordered = {key: kwargs[key] for key in expected if key in kwargs} | kwargs
    leaves, spec = _torch.tree_flatten((tuple(args), ordered))
    if spec != program.in_spec:
        names = ", ".join(f"`{name}`" for name in program.in_names)
        raise AutotpError(
            f"the model was traced with {program.in_spec.child(0).num_children} positional arguments and the keywords "
            f"{', '.join(expected) or '(none)'} (inputs {names}); call it the same way, or trace it again."
        )
    for index, constant in program.in_constants.items():
        leaf = leaves[index]
        if isinstance(constant, torch.Tensor) or isinstance(leaf, torch.Tensor) or leaf != constant:
            raise AutotpError(
                f"input `{program.in_names[index]}` was {constant!r} in the trace and cannot change; "
                "pass that value, or trace again."
            )
    return leaves


def bind_sizes(program: Program, leaves: list[Any]) -> dict[sympy.Symbol, int]:
    """The value of every symbolic size, read from the inputs' tensors.

    Raises:
        AutotpError: an input that is no tensor, or whose dtype or shape the trace does not allow.
    """
    inputs = [node for node in program.nodes if node.kind == "input"]
    positions = [index for index in range(len(leaves)) if index not in program.in_constants]
    tensors: dict[int, torch.Tensor] = {}
    for node, position in zip(inputs, positions, strict=True):
        leaf, type_ = leaves[position], node.outputs[0]
        if not isinstance(leaf, torch.Tensor) or leaf.dtype != type_.dtype or leaf.ndim != len(type_.shape):
            got = f"{leaf.dtype} of {leaf.ndim} dims" if isinstance(leaf, torch.Tensor) else repr(leaf)
            raise AutotpError(
                f"input `{node.target}` must be a tensor of {type_.dtype} with {len(type_.shape)} dims, "
                f"as traced, not {got}; convert it, or trace again."
            )
        tensors[node.index] = leaf
    sizes = {symbol: tensors[place.node].shape[place.dim] for symbol, place in program.symbols.items()}
    for symbol, size in sizes.items():
        place, (low, high) = program.symbols[symbol], program.ranges[symbol]
        if size < low or (high is not None and size > high):
            bounds = f"at least {low}" if high is None else f"{low} to {high}"
            raise AutotpError(
                f"dim {place.dim} of input `{program.nodes[place.node].target}` is {size}; the trace allows {bounds}."
            )
    for node in inputs:
        wanted = tuple(evaluate(size, sizes) for size in node.outputs[0].shape)
        if tuple(tensors[node.index].shape) != wanted:
            raise AutotpError(
                f"input `{node.target}` has shape {tuple(tensors[node.index].shape)}, but must have {wanted}; "
                "pass that, or trace again for other sizes."
            )
    return sizes


def evaluate(expression: Any, sizes: Mapping[sympy.Symbol, int]) -> Any:
    """The number (int, float or bool) that a symbolic expression is worth; anything else as it is.

    Raises:
        AutotpError: a size that is no whole number, since an input's size is not divisible as the trace requires.
    """
    if not isinstance(expression, sympy.Basic):
        return expression
    value = expression.xreplace({symbol: sympy.Integer(size) for symbol, size in sizes.items()})
    if value.is_Integer:
        return int(value)
    if value in (sympy.true, sympy.false):
        return bool(value)
    if value.is_Rational:
        raise AutotpError(
            f"the size {expression} is {value} for these inputs, not a whole number; pad them, or trace again."
        )
    return float(value)
