"""`autotp verify`: a shrunken copy of the user's model, eager against traced, then split over simulated ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from autotp import _torch
from autotp.equality import compare
from autotp.errors import AutotpError
from autotp.interpret import run
from autotp.planning import Request, adopt, make_plan, prepare, traced_sizes
from autotp.price.cluster import DEFAULT_CLUSTER, Cluster, load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.program import Program
from autotp.random_plans import random_plan
from autotp.shrink import load_shrunken
from autotp.trace import trace

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Greatest error that rounding explains, by the narrowest floating dtype in the graph; 5e-2 for 16-bit ones."""

BATCH = 2
OTHER_SIZES = (1, 3)
"""How many more sequences, and tokens per sequence, the traced graph is run on to see that its sizes may change."""


@dataclass(frozen=True)
class Check:
    """One comparison: what with what, the worst error and where. `error` is None where the check does not apply.

    Errors are absolute differences, divided by the largest reference value of that tensor where this exceeds 1.
    """

    name: str
    error: float | None
    where: str


@dataclass(frozen=True)
class VerifyReport:
    """The checks of one model, and the tolerance they are held to.

    Attributes:
        model: its name; parameters: how many the shrunken copy has.
        mesh: axis name → size; batch, sequence: sizes of the trace (None where the model has none).
        tolerance: the greatest error that passes; precision: the narrowest floating dtype in the graph, which decides it.
        checks: eager against traced, then one per plan.
        notes: what shrinking and tracing want the user to know.
    """

    model: str
    parameters: int
    mesh: Mapping[str, int]
    batch: int | None
    sequence: int | None
    tolerance: float
    precision: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...]

    def passes(self, check: Check) -> bool:
        """Whether a check applies not, or its error is within the tolerance (NaN is not)."""
        return check.error is None or check.error <= self.tolerance

    @property
    def passed(self) -> bool:
        """Whether all checks pass."""
        return all(self.passes(check) for check in self.checks)

    @property
    def worst(self) -> float:
        """The greatest error of all checks; NaN if any is."""
        errors = [check.error for check in self.checks if check.error is not None]
        return next((error for error in errors if error != error), max(errors, default=0.0))


def verify(
    spec: str,
    *,
    axes: Mapping[str, int],
    batch: int | None = None,
    seq: int | None = None,
    seed: int = 0,
    plans: int = 3,
) -> VerifyReport:
    """Compare a small float64 copy of a model with its trace, and the trace with what simulated ranks compute.

    Outputs, buffer updates and the gradient of every parameter, under random gradients of the outputs, are compared:
    eager with traced at the traced sizes and (where sizes are free) at others; one device with the ranks of `axes` for the
    planner's plan, made for prices under which splitting pays even for a small model, and for `plans` random legal plans.

    Args:
        spec: as for `autotp.models.load_model`; shrunk by `autotp.shrink.load_shrunken`.
        axes: mesh axis → size. All ranks run in this process.
        batch, seq: sizes to trace with, by default 2 × 16.
        seed: of the random plans and output gradients.

    Raises:
        AutotpError: the model cannot be loaded, shrunk, traced or planned, or `plans` is negative.
    """
    if plans < 0:
        raise AutotpError(f"{plans} random plans cannot be made; ask for 0 or more")
    loaded = load_shrunken(spec, batch=BATCH if batch is None else batch, seq=seq)
    without_dropout(loaded.model)
    program = trace(loaded.model, loaded.args, loaded.kwargs)
    state = _state(loaded.model, program)
    checks = [_eager_check(loaded.model, program, loaded.args, loaded.kwargs, seed, "eager and traced")]
    checks.append(_other_sizes(spec, loaded.model, program, loaded.batch, loaded.seq, seed))
    request, cluster = Request(axes), cluster_where_splitting_pays(load_cluster(DEFAULT_CLUSTER))
    plan = make_plan(program, request, cluster, loaded.name)
    space, decisions = adopt(program, request, plan)
    found = compare(space, decisions, state, loaded.args, loaded.kwargs, seed=seed)
    checks.append(Check("the planner's plan", found.worst, found.where))
    space, border = prepare(program, request)
    prices = ConversionPrices(cluster, request.mesh, True, traced_sizes(program))
    for number in range(seed, seed + plans):
        decisions = random_plan(space, border, prices, number)
        found = compare(space, decisions, state, loaded.args, loaded.kwargs, seed=seed)
        checks.append(Check(f"random plan {number}", found.worst, found.where))
    dtype = narrowest(program)
    return VerifyReport(
        model=loaded.name,
        parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
        mesh=dict(axes),
        batch=loaded.batch,
        sequence=loaded.seq,
        tolerance=TOLERANCES.get(dtype, 5e-2),
        precision=str(dtype).removeprefix("torch."),
        checks=tuple(checks),
        notes=(*loaded.notes, *program.notes),
    )


def cluster_where_splitting_pays(cluster: Cluster) -> Cluster:
    """The same links with accelerators so slow that even a tiny model is worth splitting: arithmetic 1e7 and memory 1e6 times slower."""
    accelerator = cluster.accelerator
    slow = replace(
        accelerator,
        peak_flops={dtype: 1e-7 * flops for dtype, flops in accelerator.peak_flops.items()},
        bandwidth=1e-6 * accelerator.bandwidth,
    )
    return replace(cluster, accelerator=slow)


def without_dropout(model: nn.Module) -> None:
    """Set the rate of every dropout module to 0, so that two runs of the model agree."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


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


# ---- eager against traced -------------------------------------------------------------------------------------------


def _state(model: nn.Module, program: Program) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    wanted = (node.target for node in program.nodes if node.kind in ("parameter", "buffer"))
    return {name: named[name].detach().clone().requires_grad_(named[name].requires_grad) for name in wanted}


def _eager_check(
    model: nn.Module, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int, name: str
) -> Check:
    """Run both forward and backward; the model's gradients and buffers are left as they were."""
    state = _state(model, program)
    traced, updates = run(program, state, args, kwargs)
    before = {key: tensor.detach().clone() for key, tensor in model.named_buffers()}
    eager = model(*args, **kwargs)
    buffers = dict(model.named_buffers())
    pairs = [
        (f"output {place}", one, other)
        for place, (one, other) in enumerate(zip(_leaves(traced), _leaves(eager), strict=True))
    ]
    pairs += [(f"buffer {key}", value, buffers[key].detach().clone()) for key, value in updates.items()]
    pairs += _gradients(model, state, pairs, seed)
    with torch.no_grad():
        for key, tensor in before.items():
            buffers[key].copy_(tensor)
    worst, where = 0.0, "nothing"
    for label, found, expected in pairs:
        error = _error(found, expected)
        if not error <= worst:
            worst, where = error, label
    return Check(name, worst, where)


def _leaves(output: Any) -> list[Tensor]:
    return [leaf for leaf in _torch.tree_flatten(output)[0] if isinstance(leaf, Tensor)]


def _gradients(
    model: nn.Module, state: Mapping[str, Tensor], outputs: list[tuple[str, Tensor, Tensor]], seed: int
) -> list[tuple[str, Tensor, Tensor]]:
    """(name, traced, eager) gradients of every parameter under the same random output gradients."""
    generator = torch.Generator().manual_seed(seed)
    both = [(one, other) for _, one, other in outputs if one.requires_grad and other.requires_grad]
    given = [torch.randn(one.shape, generator=generator, dtype=torch.float64).to(one.dtype) for one, _ in both]
    parameters = {name: tensor for name, tensor in model.named_parameters() if name in state and tensor.requires_grad}
    if not both or not parameters:
        return []
    names = list(parameters)
    traced = torch.autograd.grad([one for one, _ in both], [state[name] for name in names], given, allow_unused=True)
    eager = torch.autograd.grad([other for _, other in both], list(parameters.values()), given, allow_unused=True)
    zero = {name: torch.zeros_like(state[name]) for name in names}
    return [
        (f"gradient of {name}", zero[name] if one is None else one, zero[name] if other is None else other)
        for name, one, other in zip(names, traced, eager, strict=True)
    ]


def _error(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if not expected.numel():
        return 0.0
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))


def _other_sizes(spec: str, model: nn.Module, program: Program, batch: int | None, seq: int | None, seed: int) -> Check:
    """The traced graph on another batch and sequence length, where the trace left these free."""
    if not program.symbols:
        return Check("eager and traced, other sizes", None, "the sizes are fixed")
    larger = None if batch is None else batch + OTHER_SIZES[0]
    longer = None if seq is None else seq + OTHER_SIZES[1]
    if larger is None and longer is None:
        return Check("eager and traced, other sizes", None, "the callable takes neither batch nor seq")
    other = load_shrunken(spec, batch=larger or BATCH, seq=longer)
    name = "eager and traced, " + " × ".join(str(size) for size in (larger, longer) if size is not None)
    try:
        return _eager_check(model, program, other.args, other.kwargs, seed, name)
    except AutotpError as error:
        return Check(name, None, f"refused: {error}")
