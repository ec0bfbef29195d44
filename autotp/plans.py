"""The plan: what was decided for every tensor and operator, what it costs, and how sure that is. Saved as YAML."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from autotp.errors import AutotpError
from autotp.layouts import Cut, Layout, Split

FORMAT = 2
"""Version of the plan file; raised when old files can no longer be read."""


# ---- layout codes ---------------------------------------------------------------------------------------------------


def code_of(layout: Layout, cuts: Sequence[Sequence[Cut]]) -> str:
    """A layout as text, its cuts by number among the dim's candidates: `I|S1` or `S0:2/0|S0:2/1` (cut 2, first and second axis)."""
    words = []
    for axis, kind in enumerate(layout.kinds):
        split = layout.split_of(axis)
        if split is None:
            words.append(kind)
            continue
        number = list(cuts[split.dim]).index(split.cut)
        order = f"/{split.axes.index(axis)}" if len(split.axes) > 1 else ""
        words.append(f"S{split.dim}" + (f":{number}" if number else "") + order)
    return "|".join(words)


def layout_of(code: str, cuts: Sequence[Sequence[Cut]]) -> Layout:
    """The layout that `code_of` wrote.

    Raises:
        AutotpError: the code names a dim or cut that the tensor does not have.
    """
    kinds: list[str] = []
    axes: dict[int, dict[int, int]] = {}
    numbers: dict[int, int] = {}
    try:
        for axis, word in enumerate(code.split("|")):
            if word[0] != "S":
                if word not in ("I", "R", "P", "M"):
                    raise ValueError(word)
                kinds.append(word)
                continue
            kinds.append("S")
            body, _, order = word[1:].partition("/")
            dim, _, number = body.partition(":")
            axes.setdefault(int(dim), {})[int(order or 0)] = axis
            numbers[int(dim)] = int(number or 0)
        splits = [Split(dim, tuple(on[i] for i in sorted(on)), cuts[dim][numbers[dim]]) for dim, on in sorted(axes.items())]
    except (ValueError, IndexError) as error:
        raise AutotpError(f"the plan names the layout {code!r}, which this tensor cannot have: plan this model again") from error
    return Layout(tuple(kinds), tuple(splits))


# ---- the plan -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NodePlan:
    """What was decided for one node, which stands for `copies` equal ones.

    `key` is the strategy's key (one word per mesh axis); `operands` and `outputs` are layout codes, `shows` the output layouts
    in words; `seconds` is the time of all copies, forward and backward.
    """

    node: str
    op: str
    path: str
    copies: int
    key: tuple[str, ...]
    operands: tuple[str, ...]
    outputs: tuple[str, ...]
    shows: tuple[str, ...]
    strategy: str
    seconds: float


@dataclass(frozen=True)
class ConversionPlan:
    """One conversion of a tensor, for `copies` equal ones: layout codes from the one made to the one wanted.

    `forward` and `backward` list what each move runs, as `primitive over axis`; empty words where nothing happens.
    """

    node: str
    output: int
    copies: int
    layouts: tuple[str, ...]
    shows: tuple[str, ...]
    forward: tuple[str, ...]
    backward: tuple[str, ...]
    bytes: int
    seconds: float


@dataclass(frozen=True)
class RecomputePlan:
    """One tensor of a repeated block that the first `copies` copies do not keep for backward, but make again there.

    Of a tensor in the layout in which its operator makes it, the operator runs again; in another layout, the conversion does, with its
    collectives: so a gathered weight is gathered again. `layout` is a layout code, `shows` the same in words; `seconds` is the extra
    time of all these copies, `bytes` what each rank keeps less for it.
    """

    node: str
    output: int
    layout: str
    shows: str
    copies: int
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Time:
    """Predicted seconds per step: forward, backward and (in training) the parameter update.

    `hidden_s` of the communication run beside compute (0 unless overlap was asked for): a step takes compute + communication - hidden.
    """

    step_s: float
    compute_s: float
    communication_s: float
    hidden_s: float = 0.0


@dataclass(frozen=True)
class MemoryUse:
    """Predicted peak bytes per device: what a step holds at its highest moment, by part.

    So a part may be less than it is at other moments: at the end of a long forward there are no gradients yet.

    Attributes:
        parameters: parameters, buffers and constants.
        gradients: of parameters, as far as they are there at that moment.
        optimizer: its state.
        activations: what autograd keeps for backward.
        transient: all else: inputs and outputs, which the caller holds, gathered tensors, gradients on their way, temporaries.
        cache: in inference, buffers that the forward changes: a key/value cache.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    transient: float
    cache: float = 0.0

    @property
    def total(self) -> float:
        """All parts together."""
        return self.parameters + self.cache + self.gradients + self.optimizer + self.activations + self.transient


@dataclass(frozen=True)
class Solver:
    """How the solver ended: its name, `optimal` or `feasible`, the proven relative gap, and seconds of wall time.

    Under a memory limit that costs time, the gap is the distance from the best plan whose estimated bytes keep it (what the estimate missed
    is corrected by a walk through the plan), and `unlimited_gap` that from the fastest plan without a limit. Else the latter is None.
    """

    name: str
    status: str
    gap: float
    seconds: float
    unlimited_gap: float | None = None


@dataclass(frozen=True)
class Plan:
    """A complete, self-contained decision for one model, mesh and cluster. `print(plan)` shows it as a table.

    Attributes:
        model: the model's name; mode: "train" or "inference".
        mesh: axis name → size, outermost first; cluster: name of the priced cluster.
        batch, sequence: sizes of the first input that the prices were made for.
        program: fingerprint of the traced program (structure without sizes).
        nodes, conversions: every decision; equal layers are one entry.
        strategies: module path → column, row, replicate, batch, sequence, heads, vocab or expert (joined by "+" where mesh
            axes differ).
        collectives: {"forward"/"backward": {kind: count}} of the whole model, merged ones counted once.
        inputs, outputs: layout codes that the user declared, by tensor name.
        replicated: operators without a rule → seconds that running them on every rank costs.
        kpi: key figures (`autotp.kpi`): communication_to_computation, exposed_communication_s, shard_efficiency,
            model_flops_utilisation, memory_fraction, samples_per_s and, for tokens, tokens_per_s. `time.step_s` is the seconds of
            one parameter update.
        notes: what tracing or planning wants the user to know.
        dynamic: whether the program was traced with sizes that may change; the module then takes other batches and lengths.
        recomputed: what is not kept for backward but made again there.
    """

    model: str
    mode: str
    mesh: Mapping[str, int]
    cluster: str
    batch: int | None
    sequence: int | None
    program: str
    nodes: tuple[NodePlan, ...]
    conversions: tuple[ConversionPlan, ...]
    strategies: Mapping[str, str]
    collectives: Mapping[str, Mapping[str, int]]
    time: Time
    memory: MemoryUse
    solver: Solver
    kpi: Mapping[str, float]
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    replicated: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    dynamic: bool = True
    recomputed: tuple[RecomputePlan, ...] = ()

    @property
    def layouts(self) -> dict[str, tuple[str, ...]]:
        """Node → the layout of each of its outputs, in words (`S(1)`, one per mesh axis); a repeated node under its first name."""
        return {entry.node: entry.shows for entry in self.nodes}

    @property
    def hash(self) -> str:
        """sha256 of every decision: ranks compare it before they communicate. Prices and solver times do not count."""
        content = {
            "program": self.program,
            "mesh": dict(self.mesh),
            "mode": self.mode,
            "nodes": [(entry.node, entry.key, entry.operands, entry.outputs) for entry in self.nodes],
            "conversions": [(entry.node, entry.output, entry.layouts) for entry in self.conversions],
            "recomputed": [(entry.node, entry.output, entry.layout, entry.copies) for entry in self.recomputed],
            "border": (dict(self.inputs), dict(self.outputs)),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def __str__(self) -> str:
        from autotp.report import render  # the report stands after the plan in the flow; only printing needs it

        return render(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, in the form of the YAML file."""
        body = json.loads(json.dumps(asdict(self)))
        body["memory"]["total"] = self.memory.total
        return {"autotp_plan": FORMAT, "autotp_version": installed_version(), **body}

    def save(self, path: str | Path) -> None:
        """Write the plan as YAML; the file is complete or not there.

        Raises:
            AutotpError: the file cannot be written.
        """
        write_whole(path, yaml.safe_dump(self.to_dict(), sort_keys=False, width=140, allow_unicode=True))

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            AutotpError: the file is missing, is no plan, or was written by an incompatible version.
        """
        try:
            body = yaml.load(Path(path).read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except OSError as error:
            raise AutotpError(f"cannot read the plan {path}: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError):
            raise AutotpError(f"{path} is not a YAML file; `autotp plan MODEL --format yaml --output FILE` writes a plan") from None
        if not isinstance(body, dict) or "autotp_plan" not in body:
            raise AutotpError(f"{path} is not an autotp plan; `autotp plan MODEL --format yaml --output FILE` writes one")
        if body["autotp_plan"] != FORMAT:
            raise AutotpError(
                f"{path} has plan format {body['autotp_plan']}, but this autotp ({installed_version()}) reads format {FORMAT}: plan again"
            )
        try:
            return _from_dict(body)
        except (KeyError, TypeError, AttributeError) as error:
            raise AutotpError(f"the plan {path} is damaged ({error}): plan again") from None


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file so that it is either complete or not there.

    Raises:
        AutotpError: the file cannot be written.
    """
    target = Path(path)
    scratch = target.with_name(target.name + ".part")
    if target.exists() and not target.is_file():  # a device or a pipe is written to, never replaced
        try:
            with target.open("w") as stream:
                stream.write(text)
        except OSError as error:
            raise AutotpError(f"cannot write {path}: {error.strerror}") from None
        return
    target = target.resolve() if target.is_symlink() else target
    try:
        scratch.write_text(text)
        scratch.replace(target)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise AutotpError(f"cannot write {path}: {error.strerror}") from None
    except BaseException:  # interrupted
        scratch.unlink(missing_ok=True)
        raise


SHAPES: dict[str, type | tuple[type, ...]] = {
    "model": str, "mode": str, "mesh": dict, "cluster": str, "program": str, "nodes": list, "conversions": list, "strategies": dict,
    "collectives": dict, "time": dict, "memory": dict, "solver": dict, "kpi": dict, "inputs": dict, "outputs": dict,
    "replicated": dict, "notes": list, "dynamic": bool, "recomputed": list,
}  # fmt: skip
"""What a plan file holds under each key."""


def _from_dict(body: dict[str, Any]) -> Plan:
    for key, kind in SHAPES.items():
        if not isinstance(body[key], kind):
            raise TypeError(f"{key} is {body[key]!r}")
    for key in ("communication_to_computation", "shard_efficiency"):
        body["kpi"][key]
    for way in ("forward", "backward"):
        body["collectives"][way]
    def entry(kind: type, values: dict[str, Any]) -> Any:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})

    memory = {key: value for key, value in body["memory"].items() if key != "total"}
    plain = {key: value for key, value in body.items() if key not in ("autotp_plan", "autotp_version")}
    return Plan(
        **{
            **plain,
            "nodes": tuple(entry(NodePlan, values) for values in body["nodes"]),
            "conversions": tuple(entry(ConversionPlan, values) for values in body["conversions"]),
            "recomputed": tuple(entry(RecomputePlan, values) for values in body["recomputed"]),
            "time": Time(**body["time"]),
            "memory": MemoryUse(**memory),
            "solver": Solver(**body["solver"]),
            "notes": tuple(body["notes"]),
        }
    )


def installed_version() -> str:
    """The version of autotp, or `unknown` where it was never installed."""
    try:
        return version("autotp")
    except PackageNotFoundError:
        return "unknown"
