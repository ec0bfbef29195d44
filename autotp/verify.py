"""`autotp verify`: a shrunken copy of the user's model, eager against traced, then split over simulated ranks.

And the model at its full depth, without weights: traced with each distinct block once against traced whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from autotp import _torch
from autotp.autograd_functions import FunctionCall
from autotp.eager_check import TOLERANCES, Check, check_eager, narrowest, state_of
from autotp.equality import compare
from autotp.errors import AutotpError
from autotp.loading import LoadedModel
from autotp.models import load_model
from autotp.planning import Request, adopt, make_plan, prepare, traced_sizes
from autotp.price.cluster import DEFAULT_CLUSTER, Cluster, load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.program import Program
from autotp.random_plans import random_plan
from autotp.shrink import load_shrunken
from autotp.trace import trace

BATCH = 2
REFUSED = "refused: "
OTHER_SIZES = (1, 3)
"""How many more sequences, and tokens per sequence, the traced graph is run on to see that its sizes may change."""


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
    def refused(self) -> tuple[Check, ...]:
        """The checks that could not be made, for a reason that the user can do something about."""
        return tuple(check for check in self.checks if check.error is None and check.where.startswith(REFUSED))

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
    eager with traced (on two sets of values, and called again) at the traced sizes, at others where sizes are free, and in eval
    mode; the trace of each distinct block with that of all layers of the full model; one device with the ranks of `axes` for the
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
    state = state_of(loaded.model, program)
    checks = [check_eager(loaded.model, program, loaded.args, loaded.kwargs, seed=seed)]
    if checks[0].error is None:
        raise AutotpError(f"`{loaded.name}` cannot be verified: {checks[0].where}; correct the model or its example inputs")
    checks.append(_other_sizes(spec, loaded.model, program, loaded.batch, loaded.seq, seed))
    checks.append(_in_eval_mode(loaded, seed))
    checks.append(_at_full_depth(spec, loaded.batch, loaded.seq))
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
    """Set every rate of dropping something to 0 (`Dropout.p`, `drop_prob`, …), so that two runs of the model agree."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or (name == "p" and "Dropout" in type(module).__name__)):
                setattr(module, name, 0.0)


# ---- eager against traced -------------------------------------------------------------------------------------------


def _in_eval_mode(loaded: LoadedModel, seed: int) -> Check:
    """The model in eval mode against a trace of it in eval mode."""
    name, modes = "eager and traced, eval mode", [(module, module.training) for module in loaded.model.modules()]
    loaded.model.eval()
    try:
        program = trace(loaded.model, loaded.args, loaded.kwargs)
        return check_eager(loaded.model, program, loaded.args, loaded.kwargs, seed=seed, name=name)
    except AutotpError as error:
        return Check(name, None, f"{REFUSED}{error}")
    finally:
        for module, training in modes:
            module.training = training


def _at_full_depth(spec: str, batch: int | None, seq: int | None) -> Check:
    """The program of the full model, as it is planned, against the one for which every layer was traced."""
    name = "each block traced once and all of them"
    try:
        loaded = load_model(spec, batch=batch, seq=seq)
        once, whole = (trace(loaded.model, loaded.args, loaded.kwargs, dynamic=False, whole=whole) for whole in (False, True))
    except AutotpError as error:
        return Check(name, None, f"the full model: {error}")
    where = first_difference(once, whole)
    return Check(name, float("inf") if where else 0.0, where)


def first_difference(one: Program, other: Program) -> str:
    """Where two programs differ: the name of a node or field; "" if they are the same. Fake constants are compared by name alone."""
    for first, second in zip(one.nodes, other.nodes, strict=False):
        pairs = [(_comparable(getattr(first, item.name)), _comparable(getattr(second, item.name))) for item in fields(first)]
        if any(mine != theirs for mine, theirs in pairs):
            return f"node {second.name}" + (f" in `{second.path}`" if second.path else "")
    for item in fields(Program):
        mine, theirs = getattr(one, item.name), getattr(other, item.name)
        if item.name == "constants":
            same = mine.keys() == theirs.keys() and all(_same_values(mine[key], theirs[key]) for key in mine)
        else:
            same = len(mine) == len(theirs) if item.name == "nodes" else mine == theirs
        if not same:
            return item.name
    return ""


def _comparable(value: Any) -> Any:
    """A custom Function by what it consists of: every trace makes its own object for it."""
    return (value.function, value.held, value.differentiable, value.random) if isinstance(value, FunctionCall) else value


def _same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    unreal = _torch.fake_mode_of([one, other]) is not None or "meta" in (one.device.type, other.device.type)
    return (one.shape, one.dtype) == (other.shape, other.dtype) and (unreal or torch.equal(one, other))


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
        return check_eager(model, program, other.args, other.kwargs, seed=seed, name=name)
    except AutotpError as error:
        return Check(name, None, f"{REFUSED}{error}")
