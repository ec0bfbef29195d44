"""What the search finds for a model, read off the plan by structure: where weights rest, what moves, how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from autotp.describe import fingerprint
from autotp.equality import compare
from autotp.layouts import COLLECTIVES
from autotp.planning import Request, adopt, make_plan
from autotp.plans import Plan
from autotp.price.accelerator import Accelerator, Gemm
from autotp.price.cluster import Cluster, Link, load_cluster
from autotp.program import Program
from autotp.trace import trace
from tests.strategies.models import Decoder, Sizes

Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Found:
    """The optimum for one model on one mesh and cluster."""

    request: Request
    plan: Plan

    def moved(self, way: str, *, weights: bool) -> Counter[str]:
        """How often each `collective over axis` runs in one direction, of weights or of activations; every weight on its own."""
        counts: Counter[str] = Counter()
        for conversion in self.plan.conversions:
            if (conversion.node in self.weights) == weights:
                words = getattr(conversion, way)
                counts.update({word: conversion.copies for word in words if word.partition(" ")[0] in COLLECTIVES})
        return counts

    @property
    def weights(self) -> dict[str, str]:
        """Parameter → the layout in which it rests, in words."""
        return {entry.node: entry.shows[0] for entry in self.plan.nodes if entry.node.startswith("p_")}

    def used(self, name: str) -> set[str]:
        """The layouts in which a weight is used, in words."""
        converted = {entry.shows[-1] for entry in self.plan.conversions if entry.node == name}
        return converted or {self.weights[name]}

    def words(self, path: str) -> set[str]:
        """The words of all modules whose path ends so."""
        return {word for module, word in self.plan.strategies.items() if module.endswith(path)}

    @property
    def split_axes(self) -> set[str]:
        """Mesh axes on which anything is split."""
        shows = [show.split(", ") for entry in self.plan.nodes for show in entry.shows]
        return {axis for show in shows for axis, word in zip(self.request.axes, show, strict=True) if word[0] in "SP"}


def search(build: Build, args: tuple[Any, ...], axes: dict[str, int], cluster: str | Cluster, **asked: Any) -> Found:
    """Plan a model on `meta` in bfloat16; without pins, to the proven optimum (to 0.1 %).

    Under a memory limit, what is proved is the distance from plans without one.
    """
    with torch.device("meta"):
        model = build().to(torch.bfloat16)
        inputs = tuple(arg.to("meta", torch.bfloat16 if arg.is_floating_point() else None) for arg in args)
        program = trace(model, inputs, {}, dynamic=False)
    request = Request(axes, **asked)
    plan = make_plan(program, request, load_cluster(cluster) if isinstance(cluster, str) else cluster, "model")
    assert request.memory is not None or plan.solver.gap <= 1e-3, plan.solver
    return Found(request, plan)


def worst_at(found: Found, build: Build, args: tuple[Any, ...]) -> float:
    """The plan's own decisions carried over to a small copy of the model in float64: the worst difference from one device.

    Layouts are stored relative to each dim's candidate cuts, so that they fit a copy of the same structure at other sizes. The
    emitted module must run as many collectives as the plan claims.
    """
    torch.manual_seed(0)
    model = build()
    args16 = tuple(arg.bfloat16() if arg.is_floating_point() else arg for arg in args)
    program = _in_float64(trace(model.bfloat16(), args16, {}, dynamic=False))
    plan = replace(found.plan, program=fingerprint(program))  # which says the dtypes too
    space, decisions = adopt(program, found.request, plan)
    gradient = found.request.mode == "train"
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: tensor.detach().double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    comparison = compare(space, decisions, state, args, {}, gradient=gradient)
    ran: dict[str, Counter[str]] = {"forward": Counter(), "backward": Counter()}
    for record in comparison.simulation.records:
        ran[record.phase][record.primitive.removesuffix("_max")] += 1
    assert ran == found.plan.collectives
    return comparison.worst


def _in_float64(program: Program) -> Program:
    """The same program, casts included, on float64 in place of every floating dtype."""

    def wide(value: Any) -> Any:
        return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value

    nodes = tuple(
        replace(
            node,
            args=tree_map(wide, node.args),
            kwargs=tree_map(wide, node.kwargs),
            outputs=tuple(replace(tensor, dtype=wide(tensor.dtype)) for tensor in node.outputs),
        )
        for node in program.nodes
    )
    constants = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in program.constants.items()}
    return replace(program, nodes=nodes, constants=constants)


def tokens(batch: int, seq: int, vocabulary: int = 32) -> tuple[Tensor, Tensor]:
    """Ids and labels."""
    random = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(0, vocabulary, (2, batch, seq), generator=random)
    return ids, labels


def decoder(layers: int = 2, tied: bool = False, **sizes: int) -> Build:
    """Builds a `Decoder`."""
    return lambda: Decoder(Sizes(layers, **sizes), tied)


def prices(
    links: tuple[float, ...], devices: tuple[int | None, ...], *, latency: float = 0.0, flops: float = 1e30, memory: float = 1e30
) -> Cluster:
    """A cluster whose prices are the textbook's: bytes over bandwidth, and `latency` seconds for the start of a collective.

    Args:
        links: bytes/s per direction of each tier, innermost first; devices: how many devices each joins.
        flops, memory: FLOP/s and bytes/s of a device, by default as good as infinite.
    """
    ideal = Gemm(1, ((1, 1),), 1.0, 1.0, 0.0, 0.0, 0.0, 1, 1.0)
    names = ("fp64", "fp32", "bf16", "fp16", "fp8", "int8")
    device = Accelerator("ideal", 10**15, memory, 1.0, 0.0, dict.fromkeys(names, flops), 1.0, ideal)
    tiers = tuple(
        Link(f"tier {place}", joined, bandwidth, 1.0, 0.0, latency)
        for place, (bandwidth, joined) in enumerate(zip(links, devices, strict=True))
    )
    return Cluster("ideal", device, tiers)
