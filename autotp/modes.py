"""Train and eval: a model whose graph differs between the two modes has a graph for each, on the same parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from autotp.decisions import Decisions
from autotp.eager_check import confirm
from autotp.errors import AutotpError
from autotp.layouts import Layout
from autotp.mesh import output_names
from autotp.planning import Request, adopt, make_plan
from autotp.plans import Plan
from autotp.price.cluster import Cluster
from autotp.program import Program
from autotp.rewrite import rewrite
from autotp.runtime.agreement import Group, once
from autotp.runtime.random import share_stream
from autotp.sharded import Sharded
from autotp.solve import OutOfMemoryError
from autotp.strategies import Space
from autotp.trace import trace


@contextmanager
def other_mode(model: nn.Module) -> Iterator[None]:
    """The whole model in eval mode if it is in train mode, and the other way round; afterwards every submodule is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(not model.training)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def trace_other(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, *, dynamic: bool) -> Program | AutotpError:
    """The program of the other mode, or why there is none: many are never asked for it."""
    words = ("eval", "train") if model.training else ("train", "eval")
    with other_mode(model):
        try:
            return trace(model, args, kwargs, dynamic=dynamic)
        except AutotpError as error:
            return AutotpError(f"the module has no graph for {words[0]} mode, since the model cannot be traced in it: {error}")


def confirm_other(
    model: nn.Module,
    program: Program | AutotpError,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    *,
    check: bool | None,
    exact: bool,
) -> None:
    """`confirm` in the other mode."""
    if isinstance(program, Program):
        with other_mode(model):
            confirm(model, program, args, kwargs, check=check, exact=exact)


def layouts_at_rest(space: Space, decisions: Decisions) -> dict[str, Layout]:
    """Every parameter and buffer → the layout in which it rests."""
    program, stands_for = space.program, space.folding.representative
    return {
        str(node.target): decisions.chosen[stands_for[node.index]].outputs[0]
        for node in program.nodes
        if node.kind in ("parameter", "buffer")
    }


@dataclass(frozen=True)
class OtherMode:
    """Makes the graph of the other mode, when a module is first called in it.

    Attributes:
        program: of the other mode, or why there is none.
        request: the user's, whose pins are met by where parameters rest.
        rest: where they do.
        cluster, name: what prices are for, and the model's name.
        first: the graph of the first mode: both take their seeds from one stream.
        coordinate, device: of this rank.
        group: all ranks that run the module.
    """

    program: Program | AutotpError
    request: Request
    rest: Mapping[str, Layout]
    cluster: Callable[[], Cluster]
    name: str
    first: Sharded
    coordinate: tuple[int, ...]
    device: torch.device
    group: Group

    def __call__(self) -> tuple[Sharded, dict[str, Tensor]]:
        """The graph, parameters and buffers resting as they do, and its constants. All ranks must call it.

        Raises:
            AutotpError: there is no program, or no plan.
        """
        if isinstance(self.program, AutotpError):
            raise self.program
        program, names = self.program, output_names(self.program)
        outputs = {name: layout for name, layout in (self.request.outputs or {}).items() if name in names}
        request = replace(self.request, pins=None, outputs=outputs, rest=self.rest)
        plan = once(lambda: self._plan(program, request), self.group)
        space, decisions = adopt(program, request, plan)
        sharded = rewrite(space, decisions, self.coordinate, gradient=True, device=self.device, exact=request.exact)
        share_stream(self.first.graph, sharded.graph)
        return sharded, {spec.name: program.constants[spec.name] for spec in sharded.state if spec.kind == "constant"}

    def _plan(self, program: Program, request: Request) -> Plan:
        try:
            return make_plan(program, request, self.cluster(), self.name)
        except OutOfMemoryError:
            return make_plan(program, replace(request, memory=None), self.cluster(), self.name)
