"""One model through the whole pipeline: build → eager → trace → plan → check → simulated ranks; every stage compared."""

from __future__ import annotations

import contextlib
import json
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn
from torch.utils import _pytree as pytree

from autotp.eager_check import TOLERANCES, check_eager, narrowest
from autotp.equality import compare
from autotp.errors import AutotpError
from autotp.loading import LoadedModel
from autotp.trace import trace
from autotp.verify import without_dropout
from tests.models import InFloat64
from tests.zoo.forced import Shares, checked, forced_plan, shares

BEFORE_TRACE = ("build", "eager")
"""Stages before the library has done anything: what fails here does not run eagerly, and does not count."""


@dataclass(frozen=True)
class Result:
    """What one model did.

    Attributes:
        name: the case; stage: "ok", or where it failed; reason: why, in one line.
        nodes, parameters: of the traced program; of the model.
        precision: dtype of weights and inputs, `+float32` where the model casts inside, `lifted` where such casts were undone.
        tolerance: the greatest error that passes; errors: stage → the worst error found, scaled as `compare` does.
        operators, bytes: share of parameter-dependent operators run split, and of parameter bytes consumed split; least of all meshes.
        whole: the largest parameters read whole, as `name (bytes, operator)`; ruleless: operators without a rule.
    """

    name: str
    stage: str = "build"
    reason: str = ""
    nodes: int = 0
    parameters: int = 0
    precision: str = ""
    tolerance: float = 0.0
    errors: dict[str, float] | None = None
    operators: float = 0.0
    bytes: float = 0.0
    whole: tuple[str, ...] = ()
    ruleless: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether it is equal everywhere."""
        return self.stage == "ok"

    @property
    def ran(self) -> bool:
        """Whether the model runs eagerly, so that it counts."""
        return self.stage not in BEFORE_TRACE

    @property
    def line(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self))


def of_line(line: str) -> Result:
    """The result that `Result.line` wrote."""
    fields = json.loads(line)
    return Result(**{**fields, "whole": tuple(fields["whole"]), "ruleless": tuple(fields["ruleless"])})


Build = Callable[[torch.dtype], LoadedModel]


class Failed(Exception):
    """A comparison failed; carries the result so far."""

    def __init__(self, result: Result, reason: str) -> None:
        super().__init__(reason)
        self.result = result


def trial(
    name: str,
    build: Build,
    ranks: Sequence[int] = (2, 3),
    dtypes: Sequence[str] = ("float64", "lifted", "float32"),
    reached: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Run one model in the first of `dtypes` in which it runs and is equal; the first failure counts otherwise.

    float64 comes first, as it is. A model that does not run so, or that casts to float32 inside and whose rounding passes the
    tolerance, is tried with these casts lifted to float64, then in float32. `reached` hears of every stage that begins.
    """
    first: Result | None = None
    for precision in dtypes:
        result = _attempt(name, build, ranks, precision, reached)
        rounding = result.reason.startswith("differs") and result.tolerance == TOLERANCES[torch.float32]
        if result.ok:
            return result
        first = result if first is None or (first.stage in BEFORE_TRACE and result.ran) else first
        if result.ran and not rounding:
            break
    assert first is not None
    return first


def _attempt(name: str, build: Build, ranks: Sequence[int], precision: str, reached: Callable[[Result], None]) -> Result:
    start = time.perf_counter()
    result = Result(name, precision=precision, errors={})
    torch.manual_seed(0)
    try:
        with _lifted(precision == "lifted"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for stage in _stages(result, build, ranks, torch.float32 if precision == "float32" else torch.float64):
                result = stage
                reached(result)
        result = replace(result, stage="ok")
    except Failed as failure:
        result = replace(failure.result, reason=str(failure))
    except Exception as error:
        result = replace(result, reason=_one_line(error))
    return replace(result, seconds=round(time.perf_counter() - start, 2))


@contextlib.contextmanager
def _lifted(wanted: bool) -> Iterator[None]:
    with InFloat64() if wanted else contextlib.nullcontext():
        yield


def _stages(result: Result, build: Build, ranks: Sequence[int], dtype: torch.dtype) -> Iterator[Result]:
    """Yields the result before each stage, so that a failure finds the name of its stage."""
    yield result
    loaded = build(dtype)
    model = loaded.model
    without_dropout(model)
    yield (result := replace(result, stage="eager", parameters=sum(tensor.numel() for tensor in model.parameters())))
    _runs_twice(model, loaded)
    yield (result := replace(result, stage="trace"))
    program = trace(model, loaded.args, loaded.kwargs)
    kind = narrowest(program)
    tolerance = TOLERANCES.get(kind, TOLERANCES[torch.float32])
    if kind is not dtype:
        result = replace(result, precision=f"{result.precision}+{str(kind).removeprefix('torch.')}")
    nodes = sum(node.kind == "op" for node in program.nodes)
    yield (result := replace(result, stage="eager and trace", nodes=nodes, tolerance=tolerance))
    found = check_eager(model, program, loaded.args, loaded.kwargs)
    assert found.error is not None
    result = _judged(result, found.error, found.where)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for count in ranks:
        yield (result := replace(result, stage=f"plan {count}"))
        space, border, plan = forced_plan(program, count, result.name)
        yield (result := replace(result, stage=f"check {count}"))
        forced = checked(space, border, plan)
        result = _with_shares(result, shares(forced), first=count == ranks[0])
        yield (result := replace(result, stage=f"simulate {count}"))
        comparison = compare(forced.space, forced.decisions, state, loaded.args, loaded.kwargs)
        result = _judged(result, comparison.worst, comparison.where)
    yield result


def _runs_twice(model: nn.Module, loaded: LoadedModel) -> None:
    """Forward and backward, and forward again from the same buffers; a model that draws random numbers cannot be compared."""
    before = {name: tensor.detach().clone() for name, tensor in model.named_buffers()}
    first = _leaves(model(*loaded.args, **loaded.kwargs))
    grown = [leaf.double().sum() for leaf in first if leaf.requires_grad]
    if not grown:
        raise ValueError("no output depends on a parameter")
    torch.stack(grown).sum().backward()
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, tensor in model.named_buffers():
            if name in before and before[name].shape == tensor.shape:
                tensor.copy_(before[name])
    for one, other in zip(first, _leaves(model(*loaded.args, **loaded.kwargs)), strict=True):
        if not torch.equal(one.detach(), other.detach()):
            finite = "differ" if torch.isfinite(one.detach().double()).all() else "are not finite"
            raise ValueError(f"the outputs of two runs {finite}")
    with torch.no_grad():
        for name, tensor in model.named_buffers():
            if name in before and before[name].shape == tensor.shape:
                tensor.copy_(before[name])


def _leaves(output: object) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def _judged(result: Result, error: float, where: str) -> Result:
    assert result.errors is not None
    result = replace(result, errors={**result.errors, result.stage: error})
    if not error <= result.tolerance:
        raise Failed(result, f"differs by {error:.1e} in {where}")
    return result


def _with_shares(result: Result, found: Shares, *, first: bool) -> Result:
    if not first and found.bytes >= result.bytes:
        return replace(result, operators=min(result.operators, found.operators))
    whole = tuple(f"{name} ({size} bytes, {op})" for size, name, op in found.whole[:6])
    operators = found.operators if first else min(found.operators, result.operators)
    return replace(result, operators=operators, bytes=found.bytes, whole=whole, ruleless=found.ruleless)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:400]
    if isinstance(error, AutotpError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    return f"{type(error).__name__}: {text} ({'/'.join(last.filename.split('/')[-2:])}:{last.lineno})"
