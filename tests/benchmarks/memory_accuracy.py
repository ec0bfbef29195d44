"""Peak memory: what a plan predicts against what a rank allocates, by part.

    python -m tests.benchmarks.memory_accuracy [--ranks 1 2 4] [--modes train inference] [--gloo] [MODEL ...]
    python -m tests.benchmarks.memory_accuracy --modes train --recompute none weights attention block [--zero] [MODEL ...]

Every model is planned for a slow device, so that splitting pays, and the first rank's module runs a step on the CPU: forward, backward
and optimizer, the second of two, so that the optimizer has its state. A dispatch mode sees the results of every operator and counts
their storages from birth to death; at the highest moment each live storage belongs to one part: parameters (and buffers), gradients
(what ends as a parameter's gradient), optimizer state, activations (saved by autograd), transient (all else: inputs, outputs, temporaries).
The other ranks are not there: PyTorch's "fake" process group gives a mesh, and exchanges are taken to bring copies of the rank's own
tensors, of the sizes that real ones would have; `--gloo` runs real ranks instead. `--recompute` changes the plan: gathered weights, what
attention makes, or everything in the repeated blocks is made again in backward; `--zero` splits the batch, and every parameter at rest.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from autotp.allocations import Allocations
from autotp.decisions import Decisions, Recomputed, recomputable
from autotp.describe import conversions
from autotp.formulate import Border
from autotp.initial import state_values
from autotp.liveness import peak_memory
from autotp.planning import Request, adopt, make_plan, traced_sizes
from autotp.plans import MemoryUse, Plan
from autotp.price.cluster import Cluster, load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.price.memory import OPTIMIZERS
from autotp.program import Node, Program, Ref
from autotp.ranks import mode_of_graph
from autotp.rewrite import rewrite
from autotp.runtime.collectives import bind
from autotp.runtime.module import ParallelModule
from autotp.runtime.random import seed_module
from autotp.runtime.state import local_part
from autotp.sharded import Sharded
from autotp.strategies import Space
from autotp.trace import trace
from tests.benchmarks.memory_models import MODELS, Step
from tests.ranks import run_ranks

PARTS = ("parameters", "cache", "gradients", "optimizer", "activations", "transient")
ROUTED = ("mixtral",)
"""Models whose sizes depend on what other ranks hold: several ranks are always real."""

TOTAL_LIMIT, PART_LIMIT, SMALL_PART = 0.05, 0.05, 0.01


# ---- measuring ------------------------------------------------------------------------------------------------------


class _Saved:
    """A tensor that autograd keeps; how many there are per storage is counted while they live."""

    def __init__(self, tensor: Tensor, number: int, counts: Counter[int]) -> None:
        self.tensor = tensor
        counts[number] += 1
        weakref.finalize(self, counts.subtract, (number,)).atexit = False


def measure_step(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], optimizer: torch.optim.Optimizer | None) -> MemoryUse:
    """Bytes by part at the highest moment of one step, which the caller has run once before."""
    saved: Counter[int] = Counter()
    peak: dict[int, int] = {}
    kept: set[int] = set()

    def remember(seen: Allocations) -> None:
        peak.clear()
        peak.update(seen.sizes)
        kept.clear()
        kept.update(key for key, count in saved.items() if count)

    counter = Allocations(remember)
    state = {counter.see(tensor.detach()) for tensor in (*module.parameters(), *module.buffers(), *constants_of(module))}
    moments: set[int] = set()
    if optimizer is not None:
        optimizer.zero_grad()
        moments = {counter.see(v) for slots in optimizer.state.values() for v in slots.values() if isinstance(v, Tensor)}
    for value in torch.utils._pytree.tree_leaves((args, kwargs)):
        if isinstance(value, Tensor):
            counter.see(value)
    with counter, torch.autograd.graph.saved_tensors_hooks(lambda t: _Saved(t, counter.see(t), saved), lambda s: s.tensor):
        if optimizer is None:
            with torch.no_grad():
                outputs = module(*args, **kwargs)
        else:
            outputs = module(*args, **kwargs)
            loss_of(outputs).backward()
            optimizer.step()
    gradients = {counter.see(p.grad) for p in module.parameters() if p.grad is not None} - state
    found = dict.fromkeys(PARTS, 0.0)
    for key, size in peak.items():
        part = "parameters" if key in state else "optimizer" if key in moments else "gradients" if key in gradients else None
        found[part or ("activations" if key in kept else "transient")] += size
    del outputs
    return MemoryUse(**found)


def constants_of(module: nn.Module) -> list[Tensor]:
    """Tensors of the model's code that the graph reads."""
    return [slot.leaf for slot in module._held if slot.spec.kind == "constant"] if isinstance(module, ParallelModule) else []


def loss_of(outputs: Any) -> Tensor:
    """The scalar among the outputs."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return next(leaf for leaf in leaves if leaf.requires_grad and leaf.numel() == 1)


# ---- planning and running -------------------------------------------------------------------------------------------


def slow_cpu() -> Cluster:
    """The CPU cluster with devices so slow that splitting work beats every collective: small models are planned like large ones."""
    cluster = load_cluster("cpu")
    device = cluster.accelerator
    slow = {kind: peak * 1e-6 for kind, peak in device.peak_flops.items()}
    return replace(cluster, accelerator=replace(device, peak_flops=slow, bandwidth=device.bandwidth * 1e-5))


@dataclass(frozen=True)
class Change:
    """What is done to a plan before it is walked and run: a set of `RECOMPUTE`, and whether parameters rest split (ZeRO-3)."""

    recompute: str = "none"
    zero: bool = False

    def __call__(self, space: Space, border: Border, decisions: Decisions) -> Decisions:
        """The plan's decisions, changed."""
        decisions = split_at_rest(space, border, decisions) if self.zero else decisions
        found = []
        for number, repeat in enumerate(space.folding.repeats):
            versions = recomputable(space, decisions, number)
            chosen = frozenset(version for version in versions if RECOMPUTE[self.recompute](space.program.nodes[version[0].node]))
            found.append(Recomputed(number, repeat.count, chosen))
        return replace(decisions, recomputed=tuple(entry for entry in found if entry.versions))


RECOMPUTE: dict[str, Callable[[Node], bool]] = {
    "none": lambda node: False,
    "weights": lambda node: node.kind == "parameter",
    "attention": lambda node: any(word in node.op for word in ("attention", "softmax", "matmul", "dropout")),
    "block": lambda node: True,
}
"""Which tensors of the repeated blocks are made again, by the node that makes them."""


def split_at_rest(space: Space, border: Border, decisions: Decisions) -> Decisions:
    """The same with every parameter split at rest along its first dim that can be, and gathered where it is used."""
    chosen = dict(decisions.chosen)
    for node in space.folding.members:
        if space.program.nodes[node].kind == "parameter":
            split = [strategy for strategy in space.strategies[node] if set(strategy.outputs[0].kinds) == {"S"}]
            chosen[node] = min(split, key=lambda s: (s.outputs[0].splits[0].dim, len(s.outputs[0].splits[0].cut)), default=chosen[node])
    prices = ConversionPrices(slow_cpu(), space.mesh, True, traced_sizes(space.program))
    stands_for = space.folding.representative
    paths = {(Ref(stands_for[c.ref.node], c.ref.output), c.target): c.path for c in conversions(space, chosen, border, prices)}
    return replace(decisions, chosen=chosen, paths=paths)


def planned(step: Step, mode: str, ranks: int, change: Change = Change()) -> tuple[Program, Request, Plan]:
    step.model.train(mode == "train")
    program = trace(step.model, step.args, step.kwargs, dynamic=False)
    request = Request({"tp": ranks}, mode, data=("tp",) if change.zero else None)
    return program, request, make_plan(program, request, slow_cpu(), "model")


def adopted(program: Program, request: Request, plan: Plan, change: Change) -> tuple[Space, Decisions]:
    """What the plan decides, changed."""
    space, decisions = adopt(program, replace(request, data=None), plan)
    return space, change(space, Border(decisions.inputs, decisions.outputs), decisions)


def predicted(program: Program, request: Request, plan: Plan, change: Change) -> MemoryUse:
    """What a walk through the first rank's graph finds."""
    if change == Change():
        return plan.memory
    space, decisions = adopted(program, request, plan, change)
    sharded = rewrite(space, decisions, (0,) * len(space.mesh), gradient=request.mode == "train", device="meta")
    return peak_memory(sharded, traced_sizes(program), OPTIMIZERS[request.optimizer] if request.mode == "train" else None, True)


class Mirror:
    """`runtime.comm.Comm` for a rank whose partners all hold what it holds itself."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes

    def all_reduce(self, x: Tensor, axis: int, op: str) -> Tensor:
        return x.clone()

    def all_gather(self, x: Tensor, axis: int) -> Tensor:
        return torch.cat([x] * self.sizes[axis])

    def reduce_scatter(self, x: Tensor, axis: int) -> Tensor:
        return x[: x.shape[0] // self.sizes[axis]].clone()

    def all_to_all(self, x: Tensor, axis: int, send_sizes: Sequence[int] | None, receive_sizes: Sequence[int] | None) -> Tensor:
        rows = x.shape[0] if receive_sizes is None else sum(receive_sizes)
        return torch.index_select(x, 0, torch.arange(rows) % x.shape[0])

    def wait(self, x: Tensor) -> Tensor:
        return x


def module_of(
    step: Step, program: Program, request: Request, plan: Plan, change: Change, alone: bool = False
) -> tuple[ParallelModule, tuple[Any, ...], dict[str, Any]]:
    """This rank's module, and what it passes to it; `alone`: without the other ranks of its process group."""
    mesh = init_device_mesh("cpu", request.mesh, mesh_dim_names=tuple(request.axes))
    space, decisions = adopted(program, request, plan, change)
    sharded = rewrite(space, decisions, (dist.get_rank(),), gradient=request.mode == "train")
    seed_module(sharded.graph, 0)
    values, mode = state_values(step.model, program), mode_of_graph(step.model, program)
    module = ParallelModule(
        sharded, mesh, values, program.aliases, program.persistent, "cpu",
        signature=inspect.signature(step.model.forward), trained_mode=mode,
    )  # fmt: skip
    if alone:
        bind(sharded.graph, Mirror(request.mesh))
    return module, *own_part(sharded, step)


def measure(
    step: Step, program: Program, request: Request, plan: Plan, alone: bool = False, change: Change = Change()
) -> MemoryUse:
    """What this rank allocates."""
    module, args, kwargs = module_of(step, program, request, plan, change, alone)
    train = request.mode == "train"
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad]) if train else None
    if optimizer is not None:
        loss_of(module(*args, **kwargs)).backward()
        optimizer.step()
    else:
        with torch.no_grad():
            module(*args, **kwargs)
    return measure_step(module, args, kwargs, optimizer)


def own_part(sharded: Sharded, step: Step) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What this rank passes: inputs that are declared split, in part."""
    leaves, spec = torch.utils._pytree.tree_flatten((step.args, step.kwargs))
    for border in sharded.inputs:
        leaves[border.position] = local_part(leaves[border.position], border.layout, sharded.mesh, sharded.coordinate)
    args, kwargs = torch.utils._pytree.tree_unflatten(leaves, spec)
    return args, kwargs


def measure_first(name: str, mode: str, ranks: int, change: Change = Change()) -> tuple[MemoryUse, MemoryUse]:
    """(predicted, measured) of the first of `ranks`, the others not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    step = MODELS[name]()
    program, request, plan = planned(step, mode, ranks, change)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        return predicted(program, request, plan, change), measure(step, program, request, plan, True, change)
    finally:
        dist.destroy_process_group()


def _real_rank(name: str, mode: str, ranks: int, change: Change, folder: str) -> None:
    step = MODELS[name]()
    program, request, plan = planned(step, mode, ranks, change)
    found = measure(step, program, request, plan, change=change)
    if dist.get_rank() == 0:
        Path(folder, "found").write_text(json.dumps([asdict(predicted(program, request, plan, change)), asdict(found)]))


def measure_real(name: str, mode: str, ranks: int, change: Change = Change()) -> tuple[MemoryUse, MemoryUse]:
    """(predicted, measured) of the first of real Gloo ranks."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(_real_rank, ranks, name, mode, ranks, change, folder)
        walked, found = (MemoryUse(**parts) for parts in json.loads(Path(folder, "found").read_text()))
    return walked, found


# ---- comparing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One comparison: the error of the total, and for each part the part's error over what is allowed."""

    name: str
    mode: str
    recompute: str
    ranks: int
    predicted: MemoryUse
    measured: MemoryUse

    @property
    def total_error(self) -> float:
        return self.predicted.total / self.measured.total - 1

    def excess(self, part: str) -> float:
        """The part's error as a fraction of what is allowed: 5 % of itself or 1 % of the total, whichever is larger."""
        measured = getattr(self.measured, part)
        allowed = max(PART_LIMIT * measured, SMALL_PART * self.measured.total)
        return (getattr(self.predicted, part) - measured) / allowed

    @property
    def holds(self) -> bool:
        return abs(self.total_error) <= TOTAL_LIMIT and all(abs(self.excess(part)) <= 1 for part in PARTS)


def show(rows: list[Row], print_: Callable[..., None]) -> None:
    table = Table("model", "mode", "recompute", "ranks", "measured MB", "error", *PARTS, "holds")
    for row in rows:
        parts = []
        for part in PARTS:
            predicted, measured = getattr(row.predicted, part), getattr(row.measured, part)
            parts.append(f"{predicted / 1e6:.2f} / {measured / 1e6:.2f}" + ("" if abs(row.excess(part)) <= 1 else " !"))
        total = f"{row.measured.total / 1e6:.2f}"
        names = row.name, row.mode, row.recompute, str(row.ranks)
        table.add_row(*names, total, f"{row.total_error:+.1%}", *parts, "yes" if row.holds else "NO")
    print_(table)
    errors = [abs(row.total_error) for row in rows]
    good = sum(row.holds for row in rows)
    print_(f"total: median error {median(errors):.2%}, worst {max(errors):.2%}; {good} of {len(rows)} hold in every part")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--modes", nargs="*", default=["train", "inference"])
    parser.add_argument("--recompute", nargs="*", default=["none"], choices=list(RECOMPUTE))
    parser.add_argument("--zero", action="store_true", help="the batch is split, and every parameter at rest")
    parser.add_argument("--gloo", action="store_true", help="real ranks, each a process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, mode, recompute, ranks in product(options.models, options.modes, options.recompute, options.ranks):
        real = options.gloo or (name in ROUTED and ranks > 1)
        pair = (measure_real if real else measure_first)(name, mode, ranks, Change(recompute, options.zero))
        rows.append(Row(name, mode, recompute, ranks, *pair))
        print(f"{name} {mode} {recompute} {ranks}: {rows[-1].total_error:+.2%}", file=sys.stderr, flush=True)
    show(rows, Console(width=190).print)


if __name__ == "__main__":
    main()
