"""Is a sharded graph equal to the single device? Run both in one process and compare outputs and every gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autotp import _torch
from autotp.decisions import Decisions
from autotp.definitions import coordinates, gather, gather_gradient, gradient_layout, scatter
from autotp.interpret import bind_sizes, flatten_inputs, run
from autotp.layouts import at_sizes
from autotp.rewrite import rewrite
from autotp.sharded import Sharded
from autotp.simulate import Simulation
from autotp.strategies import Space


@dataclass(frozen=True)
class Comparison:
    """The worst absolute difference found, scaled by the largest reference value where that exceeds 1, and where it was found."""

    worst: float
    where: str
    simulation: Simulation


def emitted(space: Space, decisions: Decisions, *, gradient: bool, exact: bool = False) -> list[Sharded]:
    """What every rank of the mesh runs, in row-major order."""
    return [rewrite(space, decisions, coordinate, gradient=gradient, exact=exact) for coordinate in coordinates(space.mesh)]


def compare(
    space: Space,
    decisions: Decisions,
    state: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    gradient: bool = True,
    seed: int = 0,
    exact: bool = False,
) -> Comparison:
    """Simulate all ranks and the single device on the same inputs.

    Outputs, buffer updates and (with `gradient`) the gradient of every parameter under random output gradients are
    rebuilt from the ranks by the definitions of the layouts and compared. With `exact`, random operators draw what one device draws,
    both from the state in which PyTorch's generators are now.
    """
    program = space.program
    ranks = emitted(space, decisions, gradient=gradient, exact=exact)
    random_state = torch.get_rng_state()
    values = {name: tensor.detach().clone() for name, tensor in state.items()}
    for spec in ranks[0].state:
        if spec.kind == "constant":
            values[spec.name] = program.constants[spec.name]
        values[spec.name].requires_grad_(gradient and spec.type.requires_grad)
    output, updates = run(program, values, args, kwargs)
    reference = _torch.tree_flatten(output)[0]
    leaves = flatten_inputs(program, args, kwargs)
    inputs = [leaf for place, leaf in enumerate(leaves) if place not in program.in_constants]
    sizes = bind_sizes(program, leaves)
    places = coordinates(space.mesh)
    local_state = [
        [
            _leaf(
                scatter(values[spec.name], at_sizes(spec.layout, sizes), rank.mesh, rank.coordinate),
                spec.type.requires_grad and gradient,
            )
            for spec in rank.state
        ]
        for rank in ranks
    ]
    local_inputs = [
        [
            scatter(leaf, at_sizes(spec.layout, sizes), rank.mesh, rank.coordinate)
            for spec, leaf in zip(rank.inputs, inputs, strict=True)
        ]
        for rank in ranks
    ]
    simulation = Simulation(ranks)
    torch.set_rng_state(random_state)
    results = simulation.forward(local_state, local_inputs)
    worst, where = 0.0, "nothing"

    def judge(found: Tensor, expected: Tensor, name: str) -> None:
        nonlocal worst, where
        if found.shape != expected.shape:
            worst, where = float("inf"), f"{name} (shape {tuple(found.shape)} instead of {tuple(expected.shape)})"
        elif expected.numel():
            scale = max(1.0, float(expected.detach().abs().max()))
            error = float((found.detach().double() - expected.detach().double()).abs().max()) / scale
            if not error <= worst:
                worst, where = error, name

    for place, border in enumerate(ranks[0].outputs):
        found = gather([result[place] for result in results], at_sizes(border.layout, sizes), space.mesh)
        judge(found, reference[border.position], border.name)
    for place, name in enumerate(ranks[0].updates):
        layout = next(at_sizes(spec.layout, sizes) for spec in ranks[0].state if spec.name == name)
        locals_ = [result[len(ranks[0].outputs) + place] for result in results]
        judge(gather(locals_, layout, space.mesh), updates[name], f"buffer {name}")
    if gradient:
        generator = torch.Generator().manual_seed(seed)
        seeds: list[Tensor] = []
        tensors: list[Tensor] = []
        roots, root_seeds = [], []
        for place, border in enumerate(ranks[0].outputs):
            expected = reference[border.position]
            if not expected.requires_grad:
                continue
            full = torch.randn(expected.shape, generator=generator, dtype=torch.float64).to(expected.dtype)
            tensors.append(expected)
            seeds.append(full)
            for result, coordinate in zip(results, places, strict=True):
                if result[place].requires_grad:
                    roots.append(result[place])
                    root_seeds.append(scatter(full, gradient_layout(at_sizes(border.layout, sizes)), space.mesh, coordinate))
        if tensors:
            torch.autograd.backward(tensors, seeds)
            torch.autograd.backward(roots, root_seeds)
        for place, spec in enumerate(ranks[0].state):
            expected = values[spec.name].grad
            if not spec.type.requires_grad or expected is None:
                continue
            gradients = [(mine[place], mine[place].grad) for mine in local_state]
            parts = [torch.zeros_like(leaf) if found is None else found for leaf, found in gradients]
            judge(gather_gradient(parts, at_sizes(spec.layout, sizes), space.mesh), expected, f"gradient of {spec.name}")
    return Comparison(worst, where, simulation)


def _leaf(tensor: Tensor, requires_grad: bool) -> Tensor:
    return tensor.detach().clone().requires_grad_(requires_grad)
