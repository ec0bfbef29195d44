"""Is the trace what the model computes? Run both on the same inputs and compare outputs, buffer updates and every gradient.

A trace can succeed and be wrong: a number that Python computed is frozen in it, code behaves differently while it is traced. Such
differences show on the first input, on other values, or when the model is called again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autotp import _torch
from autotp.errors import AutotpError
from autotp.interpret import evaluate, flatten_inputs, run
from autotp.program import Program
from autotp.trace_helpers import prepared
from autotp.trace_watch import kept_attributes, kept_generators

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Greatest error that rounding explains, by the narrowest floating dtype in the graph; 5e-2 for 16-bit ones."""

AFFORDABLE = 300_000_000
"""Parameters up to which `parallelize` compares by default: the comparison holds four times the weights for a few seconds."""

AFFORDABLE_VALUES = 500_000_000
"""Elements of all intermediate results up to which it does so where sizes are not free."""

SMALL_SIZE = 8
"""Where sizes are free, `parallelize` compares on inputs of at most this size per dim."""


@dataclass(frozen=True)
class Check:
    """One comparison: what with what, the worst error and where. `error` is None where the check does not apply.

    Errors are absolute differences, divided by the largest reference value of that tensor where this exceeds 1.
    """

    name: str
    error: float | None
    where: str


def check_eager(
    model: nn.Module,
    program: Program,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    name: str = "eager and traced",
    gradient: bool = True,
) -> Check:
    """Compare on these inputs, on other values of the same kind, and on these again; the model is left as it was.

    Args:
        model: with real weights, in the mode (train or eval) in which it was traced.
        program: its trace.
        args, kwargs: real inputs that fit the trace.
        seed: of the random output gradients, and of what the model draws with torch.
        gradient: compare gradients of parameters and inputs, not outputs and buffers alone.

    Raises:
        AutotpError: the trace does not accept these inputs.
    """
    given = (tuple(args), dict(kwargs or {}))
    runs = [("", given), (", other values", _torch.tree_map_only(Tensor, _other_values, given)), (", called again", given)]
    worst, where = 0.0, "nothing"
    with kept_generators(), kept_attributes(model, []), prepared(model, []):
        for words, (positional, named) in runs:
            try:
                expected = _results(lambda state, a, k: _eager(model, state, a, k), model, program, positional, named, seed, gradient)
            except Exception as failure:
                if not words:
                    return Check(name, None, f"the model itself cannot be run here ({str(failure).partition(chr(10))[0]})")
                continue  # other values need not make sense to the model
            found = _results(lambda state, a, k: run(program, state, a, k), model, program, positional, named, seed, gradient)
            error, place = _worst(found, expected)
            if not error <= worst:
                worst, where = error, place + words
    return Check(name, worst, where)


def confirm(
    model: nn.Module,
    program: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    *,
    gradient: bool = True,
    check: bool | None = None,
    exact: bool = False,
) -> None:
    """Refuse a trace that computes something else than the model.

    Args:
        model, program, args, kwargs: what was traced; without example inputs, the model's own `dummy_inputs` served.
        gradient: compare gradients too.
        check: True compares at any size, False never; by default, where it takes seconds. Fake models are never compared.
        exact: whether both must draw the same random numbers in the same order.

    Raises:
        AutotpError: they differ.
    """
    if check is False:
        return
    if not args and kwargs is None:
        kwargs = getattr(model, "dummy_inputs", None)
    kwargs = dict(kwargs or {})
    inputs = [leaf for leaf in _torch.tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    tensors = [*model.parameters(), *model.buffers(), *inputs]
    unreal = any(tensor.device.type == "meta" for tensor in tensors) or _torch.fake_mode_of(tensors) is not None
    spread = len({tensor.device for tensor in tensors if tensor.ndim}) > 1
    if unreal or spread or (not check and sum(parameter.numel() for parameter in model.parameters()) > AFFORDABLE):
        return
    values = sum(output.numel for node in program.nodes if node.kind == "op" for output in node.outputs)
    candidates = [_small(program, args, kwargs), (args, kwargs) if check or values <= AFFORDABLE_VALUES else None]
    found = Check("", None, "")
    for given in candidates:
        if found.error is None and given is not None:
            found = check_eager(model, program, *given, gradient=gradient)
    random = any(node.kind == "op" and _may_draw(node.target, node.args) for node in program.nodes)
    tolerance = TOLERANCES.get(narrowest(program), 5e-2)
    if found.error is not None and not found.error <= tolerance and (exact or not random):  # the trace may draw in another order
        raise AutotpError(
            f"the trace of {type(model).__name__} computes something else than the model: {found.where} is off by {found.error:.1e}, so "
            "the forward depends on something that is neither an input nor a parameter nor a buffer (a counter, a global, a number "
            "computed in Python); make it one of these, or pass check=False to go on all the same."
        )


def narrowest(program: Program) -> torch.dtype:
    """The floating dtype of least precision among the tensors that a gradient or the result depends on."""
    dtypes = {
        output.dtype
        for node in program.nodes
        if node.kind == "op"
        for output in node.outputs
        if output.dtype.is_floating_point
    }
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)


def state_of(model: nn.Module, program: Program) -> dict[str, Tensor]:
    """Copies of the parameters and buffers that the program names."""
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    wanted = (node.target for node in program.nodes if node.kind in ("parameter", "buffer"))
    return {name: named[name].detach().clone().requires_grad_(named[name].requires_grad) for name in wanted}


# ---- one run --------------------------------------------------------------------------------------------------------


def _eager(model: nn.Module, state: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """The model on the tensors of `state`, and what it makes of them."""
    with _torch.with_state(model, state):
        return model(*args, **kwargs), state


def _results(
    call: Any, model: nn.Module, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int, gradient: bool
) -> dict[str, Any]:
    """Everything to compare, by name: output leaves, buffer updates, gradients."""
    state = state_of(model, program)
    args, kwargs = _torch.tree_map_only(Tensor, lambda leaf: leaf.detach().clone().requires_grad_(leaf.requires_grad), (args, kwargs))
    with _seeded(seed, state), torch.set_grad_enabled(gradient):
        output, updates = call(state, args, kwargs)
    leaves = _torch.tree_flatten(output)[0]
    found: dict[str, Any] = {f"output {place}": leaf for place, leaf in enumerate(leaves)}
    buffers = [str(node.target) for node in program.nodes if node.kind == "buffer"]
    found |= {f"buffer {key}": updates.get(key, state[key]).detach().clone() for key in buffers}
    if not gradient:
        return found
    inputs = [leaf for leaf in _torch.tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    sources = {f"gradient of {name}": state[name] for name, _ in model.named_parameters() if name in state}
    sources |= {f"gradient of input {place}": leaf for place, leaf in enumerate(inputs)}
    sources = {key: tensor for key, tensor in sources.items() if tensor.requires_grad}
    roots = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not roots or not sources:
        return found
    generator = torch.Generator().manual_seed(seed)
    given = [torch.randn(root.shape, generator=generator, dtype=torch.float64).to(root) for root in roots]
    gradients = [
        one.to_dense() if one is not None and one.is_sparse else one
        for one in torch.autograd.grad(roots, list(sources.values()), given, allow_unused=True)
    ]
    zeros = (torch.zeros_like(tensor) for tensor in sources.values())
    return found | {key: zero if one is None else one for key, one, zero in zip(sources, gradients, zeros, strict=True)}


@contextmanager
def _seeded(seed: int, state: Mapping[str, Tensor]) -> Iterator[None]:
    """The same random numbers from torch in every run; its generators are left as they were."""
    devices = {tensor.device for tensor in state.values() if tensor.device.type != "cpu"}
    with torch.random.fork_rng(devices=list(devices), device_type=next((device.type for device in devices), "cuda")):
        torch.manual_seed(seed)
        yield


def _worst(found: dict[str, Any], expected: dict[str, Any]) -> tuple[float, str]:
    """The greatest error, and where."""
    if len(found) != len(expected):
        return float("inf"), "the number of outputs"
    sizes = [_largest(value) for key, value in expected.items() if key.startswith("gradient")]
    floor = min(1.0, max(sizes, default=1.0)) or 1.0  # small gradients count as they are
    worst, where = 0.0, "nothing"
    for key, value in expected.items():
        error = _error(found.get(key), value, floor if key.startswith("gradient") else 1.0)
        if not error <= worst:
            worst, where = error, key
    return worst, where


def _largest(value: Any) -> float:
    if not isinstance(value, Tensor) or not value.numel():
        return 0.0
    return float(value.detach().abs().double().nan_to_num().max())


def _error(found: Any, expected: Any, floor: float) -> float:
    """The greatest difference, over the largest reference value or `floor`; equal infinities and NaN are no difference."""
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        return 0.0 if type(found) is type(expected) and found == expected else float("inf")
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if not expected.numel():
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    found, expected = found.detach().to(wide), expected.detach().to(wide)
    same = (found == expected) | (found.isnan() & expected.isnan())
    difference = torch.where(same, 0.0, (found - expected).abs())
    return float(difference.max()) / max(floor, float(expected.abs().nan_to_num(posinf=0.0).max()))


# ---- other inputs ---------------------------------------------------------------------------------------------------


def _other_values(tensor: Tensor) -> Tensor:
    """The same values elsewhere, and with the other sign where both signs occur: what they mean stays possible."""
    turned = tensor.detach().flip(tuple(range(tensor.ndim)))
    if tensor.is_floating_point() and tensor.numel() and bool((tensor < 0).any()) and bool((tensor > 0).any()):
        turned = -turned
    return turned.requires_grad_(tensor.requires_grad)


def _small(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The inputs cut to a few elements where sizes are free; None where none is, or the model's sizes do not allow it."""
    sizes = {}
    for symbol, place in program.symbols.items():
        low, hint = program.ranges[symbol][0], program.nodes[place.node].outputs[0].hint[place.dim]
        sizes[symbol] = min(hint, max(low, SMALL_SIZE))
    leaves = flatten_inputs(program, args, kwargs)
    positions = [index for index in range(len(leaves)) if index not in program.in_constants]
    inputs = [node for node in program.nodes if node.kind == "input"]
    try:
        for node, position in zip(inputs, positions, strict=True):
            for dim, size in enumerate(node.outputs[0].shape):
                leaves[position] = leaves[position].narrow(dim, 0, evaluate(size, sizes))
    except (AutotpError, RuntimeError):
        return None
    if all(sizes[s] == program.nodes[p.node].outputs[0].hint[p.dim] for s, p in program.symbols.items()):
        return None
    args, kwargs = _torch.tree_unflatten(leaves, program.in_spec)
    return tuple(args), kwargs


def _may_draw(target: Any, args: tuple[Any, ...]) -> bool:
    if target is torch.ops.aten.scaled_dot_product_attention.default:
        return len(args) > 4 and bool(args[4])
    return _torch.is_random(target)
