"""The pipeline: trace → fold → rules → strategies → price → solve → plan → check → rewrite → run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autotp.batch_axes import sizes_of
from autotp.eager_check import confirm
from autotp.errors import AutotpError
from autotp.initial import Model, agree_on_values, begin, state_values
from autotp.mesh import parse_mesh
from autotp.mesh_choice import does_not_fit, plan_on
from autotp.mesh_search import MeshSearch, Traced
from autotp.mesh_shapes import check_devices
from autotp.modes import OtherMode, confirm_other, layouts_at_rest, trace_other
from autotp.planning import Request, adopt, make_plan
from autotp.plans import Plan
from autotp.price.cluster import DEFAULT_CLUSTER, Cluster, load_cluster
from autotp.ranks import device_mesh_of, facts, mode_of_graph, ranks_of
from autotp.recommendation import USABLE
from autotp.rewrite import rewrite
from autotp.runtime.agreement import agree, agree_on, once, share, together
from autotp.runtime.module import ParallelModule
from autotp.runtime.random import seed_module
from autotp.solve import OutOfMemoryError
from autotp.trace import trace

Mesh = int | Sequence[int] | Mapping[str, int] | DeviceMesh


def plan(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    mesh: Mesh | None = None,
    gpus: int | None = None,
    cluster: str | Path | Cluster | None = None,
    mode: str = "train",
    memory: float | None = None,
    pins: Mapping[str, str] | None = None,
    inputs: Mapping[str, Any] | None = None,
    outputs: Mapping[str, Any] | None = None,
    optimizer: str = "adamw",
    compiled: bool = False,
    overlap: bool = False,
) -> Plan:
    """Decide how to split `model` over `mesh`, and say what that costs. Needs no GPU, no process group and no real weights.

    Inputs and outputs of the parallel module are GLOBAL: every rank passes what one device would get, and receives what one
    device would give. A tensor named in `inputs` or `outputs` is LOCAL instead: each rank passes or receives its own part, split
    as declared. Example inputs (`args`, `kwargs`) are always global.

    Args:
        model: any module; its parameters may be fake or on `meta`.
        args, kwargs: example inputs of one step; prices are for their sizes. By default the model's `dummy_inputs`.
        mesh: `8`, `(2, 4)`, `{"dp": 2, "tp": 4}` or a `DeviceMesh`.
        gpus: in place of a mesh, how many devices: the fastest mesh of so many is searched, as `recommend` does. Its axes `dp` and
            `fsdp` split the batch, inputs and outputs included, and a plan may use 95 % of a device's memory by default.
        cluster: a name that `autotp clusters` lists, a YAML file, or a `Cluster`; by default `dgx-h100`.
        mode: "train" (forward, backward, optimizer update) or "inference" (forward alone).
        memory: peak bytes allowed per device; no limit by default.
        pins: module-path pattern → strategy, e.g. `{"*.q_proj": "column", "lm_head": "replicate"}`.
        inputs, outputs: tensor name → layout, e.g. `{"input_ids": {"dp": 0}}` for a batch split over axis `dp`,
            `{"logits": {"tp": 2}}`; `"partial"` in place of a dim leaves an output unsummed. DTensor placements, one per mesh
            axis, are understood too.
        optimizer: what is counted for the update and its state: "adamw" (Adam too), "adamw-master" (with float32 copies of 16-bit
            parameters), "adafactor", "momentum" or "sgd".
        overlap: price gathers of weights and reductions of their gradients, in repeated blocks, as hidden behind compute; the module always
            runs them so. By default all communication counts as exposed.
        compiled: price operators as `torch.compile` fuses them, not one kernel each as eager PyTorch runs them.

    Raises:
        AutotpError: the model cannot be traced, or a request cannot be met; the message says what to do.
    """
    priced = cluster_of(cluster, "cuda")
    if (mesh is None) == (gpus is None):
        raise AutotpError("give either mesh, such as mesh={'dp': 2, 'tp': 4}, or gpus, such as gpus=8")
    if gpus is not None:
        check_devices(priced, gpus)
        if inputs or outputs:
            raise AutotpError("inputs and outputs name axes of a mesh, which gpus leaves open: give a mesh in place of gpus")
        memory = USABLE * priced.accelerator.memory_bytes if memory is None else memory
    axes = {"tp": 1} if mesh is None else parse_mesh(mesh)
    request = Request(axes, mode, memory, pins, inputs, outputs, compiled=compiled, overlap=overlap, optimizer=optimizer)
    program = trace(model, args, kwargs)
    search = MeshSearch(Traced(program, None, None), request, priced, type(model).__name__, by_batch=gpus is not None)
    if gpus is not None:
        return plan_on(replace(search, traced=Traced(program, *sizes_of(program))), gpus)
    try:
        return make_plan(program, request, priced, search.model)
    except OutOfMemoryError as error:
        raise does_not_fit(search, axes, error.least) from error


def parallelize(
    model: Model,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    mesh: Mesh | None = None,
    plan: Plan | str | Path | None = None,
    cluster: str | Path | Cluster | None = None,
    mode: str = "train",
    memory: float | None = None,
    pins: Mapping[str, str] | None = None,
    inputs: Mapping[str, Any] | None = None,
    outputs: Mapping[str, Any] | None = None,
    optimizer: str = "adamw",
    compiled: bool = False,
    overlap: bool = False,
    randomness: str = "independent",
    check: bool | None = None,
    weights: str | Path | None = None,
    seed: int | None = None,
) -> ParallelModule:
    """The same model, running in parallel on all ranks of `mesh`. Every rank calls this with the same model and arguments.

    Inputs and outputs of the result are GLOBAL: every rank passes what one device would get, and receives what one device would
    give. A tensor named in `inputs` or `outputs` is LOCAL instead: each rank passes or receives its own part, split as declared.
    Example inputs (`args`, `kwargs`) are always global.

    Rank 0 plans; the others take its plan, and all compare its hash before they communicate.

    Args:
        model: a module with real weights, equal on all ranks, which is left as it was; or a function without arguments that builds it.
        mesh: as for `plan`; by default all ranks of the (torchrun) process group on one axis. A `DeviceMesh` may be part of a larger
            one, such as `whole["tp"]`: each part then holds a model of its own.
        plan: a `Plan`, or a file that one was saved to; by default a new one. Its mode counts, and cluster, memory and pins
            cannot be given beside it.
        cluster: what prices are for; by default `cpu` for a mesh of CPUs, `dgx-h100` for GPUs.
        args, kwargs, mode, memory, pins, inputs, outputs, optimizer, compiled, overlap: as for `plan`; the module is never compiled here.
        randomness: "independent": a tensor that is split gets random numbers (dropout) of their own on each rank, right in distribution;
            "exact": all ranks draw from PyTorch's generator, at the same seed, what one device would draw, whatever the mesh. That
            makes each random tensor whole for a moment, on every rank.
        check: run the model once and compare outputs and gradients with its trace, on rank 0, before anything else. By default
            where that takes seconds: real weights on one device, at most 300 million parameters; True: at any size; False: never.
        weights: a checkpoint that parameters and buffers are read from, by their names in `model`: safetensors files (a directory, a
            file, or an index of several), or what `autotp.save` wrote. Each rank reads its own pieces alone. The model may then be on
            `meta`; of a function that builds it, the parameters get no memory.
        seed: of the function that builds the model: the parameters are those of one device with this seed. It runs on the CPU of each
            rank, of large models tensor by tensor.

    Returns:
        A trainable module with the names and parameters of `model`, the parameters as DTensors.

    Raises:
        AutotpError: on every rank alike, so that none is left waiting.
    """
    group = ranks_of(mesh)
    model, stored = begin(model, weights, seed, group)
    agree_on(facts(model, args, kwargs, mesh, plan), group)
    together(lambda: _check_plan(plan, alone=cluster is None and memory is None and pins is None), group)
    given = once(lambda: Plan.load(plan) if isinstance(plan, (str, Path)) else plan, group)
    device_mesh = device_mesh_of(given.mesh if given and mesh is None else mesh)
    axes, mode = parse_mesh(device_mesh), given.mode if given else mode
    options: dict[str, Any] = {"compiled": compiled, "overlap": overlap, "optimizer": optimizer, "randomness": randomness}
    request = together(lambda: Request(axes, mode, memory, pins, inputs, outputs, **options), group)
    agree(repr(request), f"what is asked for (mode, memory, pins, inputs, outputs, {', '.join(options)})", group)
    program = together(lambda: trace(model, args, kwargs, dynamic=given.dynamic if given else True), group)
    once(lambda: confirm(model, program, args, kwargs, gradient=mode == "train", check=check, exact=request.exact), group)
    device = torch.device(device_mesh.device_type)
    priced = partial(cluster_of, cluster, device.type)
    name = type(model).__name__
    decided = given or once(lambda: make_plan(program, request, priced(), name), group)
    space, decisions = together(lambda: adopt(program, request, decided), group)
    agree(decided.hash, "the plan", group)
    agree_on_values(model, stored, group)
    coordinate = tuple(device_mesh.get_coordinate() or ())
    sharded = together(lambda: rewrite(space, decisions, coordinate, gradient=mode == "train", device=device, exact=request.exact), group)
    if not request.exact:
        seed_module(sharded.graph, share(int(torch.randint(2**62, ())), group))
    trained_mode = mode_of_graph(model, program)
    other = None
    if mode == "train" and trained_mode is not None:
        traced = trace_other(model, args, kwargs, dynamic=decided.dynamic)
        once(lambda: confirm_other(model, traced, args, kwargs, check=check, exact=request.exact), group)
        other = OtherMode(traced, request, layouts_at_rest(space, decisions), priced, name, sharded, coordinate, device, group)
    return together(
        lambda: ParallelModule(
            sharded,
            device_mesh,
            state_values(model, program, stored, sharded),
            program.aliases,
            program.persistent,
            device,
            signature=inspect.signature(model.forward),
            trained_mode=trained_mode,
            other=other,
        ),
        group,
    )


def _check_plan(plan: Plan | str | Path | None, *, alone: bool) -> None:
    if plan is not None and not isinstance(plan, (Plan, str, Path)):
        raise AutotpError(f"plan is {plan!r}; pass a Plan, or the file that one was saved to")
    if plan is not None and not alone:
        raise AutotpError("a plan is given together with cluster, memory or pins, which only a new plan can follow: leave one out")


def cluster_of(cluster: str | Path | Cluster | None, device: str) -> Cluster:
    """The cluster that the user named; by default `cpu` for CPUs, `dgx-h100` for other devices."""
    if isinstance(cluster, Cluster):
        return cluster
    return load_cluster(cluster or ("cpu" if device == "cpu" else DEFAULT_CLUSTER))
