"""The middle of the pipeline: from a traced program to a plan. Needs no GPU, no process group, no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from autotp.batch_axes import batch_border, keep_to_batch, layouts_in_use, narrowed
from autotp.check import check
from autotp.decisions import Decisions, read_plan
from autotp.describe import describe, fingerprint
from autotp.errors import AutotpError
from autotp.exact import drawn_whole
from autotp.fold import fold, unfolded
from autotp.formulate import Border, Formulation, formulate, outgoing_tensors
from autotp.layouts import Layout
from autotp.memory_limit import Walked, smallest_peak, solve_within, walk
from autotp.mesh import border_layouts, output_names
from autotp.plans import Plan, code_of
from autotp.price.cluster import Cluster
from autotp.price.conversion import ConversionPrices
from autotp.price.memory import OPTIMIZERS
from autotp.program import Program, Ref, Size, TensorType
from autotp.solve import Solution, least_plan
from autotp.strategies import Space, build_space
from autotp.words import apply_pins

COMPILED = "operators are priced as torch.compile fuses them: compile the module"


@dataclass(frozen=True)
class Request:
    """What the user asks of a plan, apart from the model: see `autotp.plan`."""

    axes: Mapping[str, int]
    mode: str = "train"
    memory: float | None = None
    pins: Mapping[str, str] | None = None
    inputs: Mapping[str, Any] | None = None
    outputs: Mapping[str, Any] | None = None
    data: tuple[str, ...] | None = None
    """Mesh axes that split the batch and nothing else, inputs and outputs included; the others then never split it. None: free."""
    compiled: bool = False
    """Price operators as `torch.compile` fuses them; else each is a kernel of its own, as in eager PyTorch."""
    rest: Mapping[str, Layout] | None = None
    """Parameter or buffer → the layout in which it rests, as another plan of the same model has it; the others are free."""
    overlap: bool = False
    """Count gathers of weights and reductions of gradients as hidden by compute; the module always runs them so."""
    optimizer: str = "adamw"
    """The optimizer whose state and update are counted in training: a name of `price.memory.OPTIMIZERS`."""
    randomness: str = "independent"
    """ "exact": random operators draw what one device draws, and are split only where they can; "independent": each piece draws its own."""

    def __post_init__(self) -> None:
        """Refuse what is no request at all."""
        if self.optimizer not in OPTIMIZERS:
            raise AutotpError(f"optimizer {self.optimizer!r} is unknown; give one of {', '.join(OPTIMIZERS)}")
        if self.randomness not in ("independent", "exact"):
            raise AutotpError(f"randomness is {self.randomness!r}; give 'independent', or 'exact' to draw what one device draws")
        if self.memory is not None and (not isinstance(self.memory, (int, float)) or not self.memory > 0 or self.memory == float("inf")):
            raise AutotpError(f"memory is {self.memory!r}; give the bytes allowed per device as a positive number, e.g. 80e9")
        if self.pins is not None and (
            not isinstance(self.pins, Mapping) or not all(isinstance(text, str) for pair in self.pins.items() for text in pair)
        ):
            raise AutotpError(f"pins is {self.pins!r}; write a dict from module patterns to strategies, e.g. {{'*.q_proj': 'column'}}")

    @property
    def exact(self) -> bool:
        """Whether random operators draw what one device draws."""
        return self.randomness == "exact"

    @property
    def mesh(self) -> tuple[int, ...]:
        """The sizes of the mesh axes."""
        return tuple(self.axes.values())


def prepare(program: Program, request: Request) -> tuple[Space, Border]:
    """Fold the program, list every node's strategies, and read the declared border."""
    inputs, outputs = border_layouts(program, request.axes, request.inputs, request.outputs)
    declared: dict[Ref, Layout] = {Ref(node): layout for node, layout in inputs.items()}
    declared |= {program.outputs[position]: layout for position, layout in outputs.items()}
    rest = request.rest or {}
    held = [node for node in program.nodes if node.kind in ("parameter", "buffer")]
    resting = {node.index: rest[node.target] for node in held if node.target in rest}
    folding = fold(program)
    if any(len({resting.get(node) for node in members}) > 1 for members in folding.members.values()):
        folding = unfolded(program)  # layers that rest in different layouts are not the same
    space = build_space(program, folding, request.mesh, declared | {Ref(node): layout for node, layout in resting.items()})
    return space, Border(inputs, outputs)


@dataclass(frozen=True)
class Posed:
    """A request written as a problem: what `solve_within` and `describe` need."""

    program: Program
    space: Space
    border: Border
    prices: ConversionPrices
    formulation: Formulation

    def walk(self, found: Solution) -> Walked:
        """Peak bytes per device of a solution, and what it could make again."""
        return walk(self.space, self.prices, self.border, self.formulation, found)


def pose(program: Program, request: Request, cluster: Cluster) -> Posed:
    """List and price every strategy.

    Raises:
        AutotpError: a pin or a border declaration cannot be kept, or the mesh is larger than the cluster.
    """
    if cluster.max_devices is not None and prod(request.mesh) > cluster.max_devices:
        raise AutotpError(
            f"the mesh {dict(request.axes)} needs {prod(request.mesh)} devices, but {cluster.name} has {cluster.max_devices}"
        )
    program = for_mode(program, request.mode)
    if request.data is not None:
        inputs, outputs = batch_border(program, request.data)
        request = replace(request, inputs={**inputs, **(request.inputs or {})}, outputs={**outputs, **(request.outputs or {})})
    space, border = prepare(program, request)
    prices = ConversionPrices(
        cluster, request.mesh, request.mode == "train", traced_sizes(program), request.compiled, OPTIMIZERS[request.optimizer],
        request.overlap and not request.compiled,  # a compiler orders collectives itself
    )
    allowed = apply_pins(space, dict(request.pins or {}))
    if request.exact:
        allowed = drawn_whole(space, allowed)
    if request.data is not None:
        data = [place for place, name in enumerate(request.axes) if name in request.data]
        space, allowed = narrowed(space, keep_to_batch(space, data, allowed))
        prices.places = layouts_in_use(space, outgoing_tensors(space, border))
    return Posed(program, space, border, prices, formulate(space, prices, border, allowed, request.memory))


def least_peak(program: Program, request: Request, cluster: Cluster, *, time_limit: float = 60.0) -> float:
    """Peak bytes per device of the plan with the smallest estimate, which makes again what it can: some plan needs no more.

    Raises: as `pose`.
    """
    posed = pose(program, request, cluster)
    return smallest_peak(posed.walk(least_plan(posed.formulation.problem, time_limit=time_limit)))


def make_plan(
    program: Program, request: Request, cluster: Cluster, model: str, *, time_limit: float = 300.0, gap: float = 1e-4
) -> Plan:
    """Price every strategy, solve, name the result and check it.

    Args:
        time_limit, gap: seconds for the solver, and the relative distance from the optimum at which it may stop.

    Raises:
        AutotpError: a pin, a border declaration or the memory limit cannot be kept.
    """
    posed = pose(program, request, cluster)
    program, space, border, prices, formulation = posed.program, posed.space, posed.border, posed.prices, posed.formulation
    fitted = solve_within(formulation.problem, posed.walk, time_limit=time_limit, gap=gap)
    plan = describe(
        space,
        prices,
        border,
        formulation,
        fitted.solution,
        model=model,
        mode=request.mode,
        axes=request.axes,
        declared=_border_codes(space, border),
        notes=(*program.notes, *([COMPILED] if request.compiled else [])),
        memory=fitted.memory,
        recomputation=fitted.recomputation,
    )
    plan = replace(plan, solver=replace(plan.solver, unlimited_gap=fitted.unlimited_gap))
    check(program, space, plan)
    device = cluster.accelerator.memory_bytes
    return plan if plan.memory.total <= device else replace(plan, notes=(*plan.notes, _too_large(plan.memory.total, device)))


def _too_large(needed: float, device: float) -> str:
    return (
        f"does not fit: it needs {needed / 2**30:.4g} GiB of {device / 2**30:.4g} GiB per device; "
        "give a memory limit, use more devices, or a smaller batch"
    )


def adopt(program: Program, request: Request, plan: Plan) -> tuple[Space, Decisions]:
    """Read a plan back against the program that will run it, and check it.

    Raises:
        AutotpError: the plan was made for another model, mode, mesh or border.
    """
    program = for_mode(program, plan.mode)
    if list(plan.mesh.items()) != list(request.axes.items()):
        raise AutotpError(f"the plan was made for the mesh {dict(plan.mesh)}, not {dict(request.axes)}: plan again, or use its mesh")
    if plan.program != fingerprint(program):
        raise AutotpError(f"the plan was made for another model ({plan.model}) or another form of its inputs: plan this model again")
    request = replace(
        request,
        inputs=_declarations(plan.inputs, request.axes) if request.inputs is None else request.inputs,
        outputs=_declarations(plan.outputs, request.axes) if request.outputs is None else request.outputs,
    )
    space, border = prepare(program, request)
    for what, made, asked in zip(("inputs", "outputs"), (plan.inputs, plan.outputs), _border_codes(space, border), strict=True):
        if dict(made) != asked:
            raise AutotpError(f"the plan was made with {what} declared as {dict(made)}, not {asked}: plan again, or declare nothing here")
    decisions = read_plan(space, plan, dict(border.inputs), dict(border.outputs))
    check(program, space, plan)
    return space, decisions


def _border_codes(space: Space, border: Border) -> tuple[dict[str, str], dict[str, str]]:
    """The declared layouts of inputs and outputs as a plan stores them, by tensor name."""
    program, names = space.program, output_names(space.program)
    return (
        {str(program.nodes[n].target): code_of(layout, space.dim_cuts(Ref(n))) for n, layout in border.inputs.items()},
        {names[p]: code_of(layout, space.dim_cuts(_owner(space, p))) for p, layout in border.outputs.items()},
    )


def _declarations(codes: Mapping[str, str], axes: Mapping[str, int]) -> dict[str, dict[str, int | str]]:
    """Layout codes of the border as users declare them: axis → dim, or "partial"."""
    found = {}
    for name, code in codes.items():
        words = dict(zip(axes, code.split("|"), strict=True))
        found[name] = {
            axis: "partial" if word == "P" else int(word[1:].partition("/")[0].partition(":")[0])
            for axis, word in words.items()
            if word != "I"
        }
    return found


def traced_sizes(program: Program) -> dict[Size, int]:
    """Every symbolic size at its value in the example inputs."""
    found: dict[Size, int] = {}
    for symbol, source in program.symbols.items():
        found[symbol] = program.nodes[source.node].outputs[0].hint[source.dim]
    return found


def for_mode(program: Program, mode: str) -> Program:
    """The program itself for training; for inference the same without any gradient, so that I and R become one.

    Raises:
        AutotpError: an unknown mode.
    """
    if mode == "train":
        return program
    if mode != "inference":
        raise AutotpError(f"mode {mode!r} is neither 'train' nor 'inference'")
    plain: dict[TensorType, TensorType] = {}

    def strip(tensor: TensorType) -> TensorType:
        if tensor not in plain:
            plain[tensor] = replace(tensor, requires_grad=False)
        return plain[tensor]

    nodes = tuple(replace(node, outputs=tuple(strip(tensor) for tensor in node.outputs)) for node in program.nodes)
    return replace(program, nodes=nodes)


def _owner(space: Space, position: int) -> Ref:
    ref = space.program.outputs[position]
    return Ref(space.folding.representative[ref.node], ref.output)
