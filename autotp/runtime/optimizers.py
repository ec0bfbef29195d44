"""Optimizers on parameters of which a rank holds pieces.

An optimizer that treats every element for itself (SGD, Adam, RMSprop, …) steps on the pieces as it does on the whole. One that looks at a
whole tensor (Muon, Adafactor, LAMB) would step otherwise, without an error. Which of the two it is, is found by running it: on a small
tensor, and on the pieces of that tensor. It is refused before its first step if it needs whole tensors; `optimizer` gives it those.
Likewise where `DTensor`, as which a module shows its parameters, lacks an operator that the optimizer needs (Rprop): `optimizer` then
gives it the plain tensors of this rank.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autotp._torch import dtensor_wrapper, local_of
from autotp.errors import AutotpError
from autotp.runtime.random import generator_of
from autotp.runtime.state import gather_full, local_part
from autotp.sharded import StateSpec

if TYPE_CHECKING:
    from autotp.runtime.module import ParallelModule

Optimizer = torch.optim.Optimizer

STEPS = 12
"""Steps of a trial: warm-ups and statistics of optimizers begin to count within so many."""

TOLERANCE = 1e-9
"""How far pieces and the whole may part in a trial, relative to the largest change of a parameter; in float64."""


def optimizer(
    kind: type[Optimizer], module: ParallelModule, params: Iterable[nn.Parameter | dict[str, Any]] | None = None, **options: Any
) -> Optimizer:
    """An optimizer of this kind for a parallel module, equal to the one on a single device.

    Mostly this is just `kind(params, **options)`. If it looks at whole tensors, parameters and gradients are gathered for each step, which
    every rank then does on all of them: the state of the optimizer lies whole on every rank, and in a step parameters and gradients
    do too. Parameter groups, schedulers, closures, `GradScaler` and `state_dict` work as ever.

    Args:
        kind: the class, e.g. `torch.optim.Muon`.
        module: the parallel module. All ranks must call this, and `step`, together.
        params: parameters or parameter groups of it, as the class takes them; by default all.
        options: for the class.

    Raises:
        AutotpError: a parameter is not one of the module's.

    Example:
        ```python
        matrices = [p for p in module.parameters() if p.ndim == 2]
        muon = autotp.optimizer(torch.optim.Muon, module, matrices, lr=1e-3)
        ```
    """
    held: list[Any] = list(module.parameters() if params is None else params)
    groups = [{**options, **group} for group in _groups_of(held)]
    if not all(acts_on_elements(kind, group, module_device(module)) for group in groups):
        return BesideOptimizer(kind, module, held, options, whole=True)
    if not all(runs_on_dtensors(kind, group, module.device_mesh) for group in groups):
        return BesideOptimizer(kind, module, held, options, whole=False)
    return kind(held, **options)


def module_device(module: ParallelModule) -> torch.device:
    """Where the module's parameters lie."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def _groups_of(params: list[Any]) -> list[dict[str, Any]]:
    """The options of each parameter group."""
    groups = params if params and isinstance(params[0], dict) else [{"params": params}]
    return [{key: value for key, value in group.items() if key not in ("params", "param_names")} for group in groups]


class BesideOptimizer(Optimizer):
    """Lets an optimizer step on plain tensors in place of the parameters of a parallel module; made by `optimizer`.

    Args:
        kind, module, params, options: as for `optimizer`.
        whole: on parameters gathered whole; else on this rank's pieces.
    """

    def __init__(
        self, kind: type[Optimizer], module: ParallelModule, params: list[Any], options: Mapping[str, Any], whole: bool
    ) -> None:
        super().__init__(params, dict(options))
        self._module, self.whole = module, whole
        self._ours = [parameter for group in self.param_groups for parameter in group["params"]]
        self._specs = [module.spec_of(parameter) for parameter in self._ours]
        self._plain = [nn.Parameter(self._read(parameter, spec)) for parameter, spec in zip(self._ours, self._specs, strict=True)]
        taken = iter(self._plain)
        groups = [{**group, "params": [next(taken) for _ in group["params"]]} for group in self.param_groups]
        self._inner = kind(groups, **options)
        for mine, theirs in zip(self.param_groups, self._inner.param_groups, strict=True):
            mine.update(_without_params(theirs))
        self.defaults = self._inner.defaults
        self._release()

    @property
    def inner(self) -> Optimizer:
        """The optimizer that steps."""
        return self._inner

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of the optimizer on the plain tensors. All ranks must call it."""
        for mine, theirs in zip(self.param_groups, self._inner.param_groups, strict=True):
            theirs.update(_without_params(mine))
        for parameter, plain, spec in zip(self._ours, self._plain, self._specs, strict=True):
            plain.data = self._read(parameter, spec)
            if parameter in self.state:
                self._inner.state[plain] = {key: _local(value) for key, value in self.state[parameter].items()}
        self._read_gradients()
        try:
            loss = self._inner.step() if closure is None else self._inner.step(partial(self._closed, closure))
            self._write()
            for parameter, plain in zip(self._ours, self._plain, strict=True):
                if plain in self._inner.state:
                    self.state[parameter] = {key: self._shown(value, plain, parameter) for key, value in self._inner.state[plain].items()}
        finally:
            self._release()
        for mine, theirs in zip(self.param_groups, self._inner.param_groups, strict=True):
            mine.update(_without_params(theirs))
        return loss

    def _closed(self, closure: Callable[[], float]) -> float:
        """The user's closure at the values that the optimizer tries."""
        self._write()
        with torch.enable_grad():
            loss = closure()
        self._read_gradients()
        return loss

    def _read(self, tensor: Tensor, spec: StateSpec) -> Tensor:
        return gather_full(local_of(tensor), spec, self._module.device_mesh) if self.whole else local_of(tensor).detach()

    def _read_gradients(self) -> None:
        for parameter, plain, spec in zip(self._ours, self._plain, self._specs, strict=True):
            plain.grad = None if parameter.grad is None else self._read(parameter.grad, spec)

    def _write(self) -> None:
        """Parameters as the optimizer has them; on pieces it has written into these themselves."""
        mesh = self._module.device_mesh
        for parameter, plain, spec in zip(self._ours, self._plain, self._specs, strict=True) if self.whole else ():
            part = local_part(plain, spec.layout, tuple(mesh.shape), tuple(mesh.get_coordinate() or ()))
            with torch.no_grad():
                local_of(parameter).copy_(part)

    def _shown(self, value: Any, plain: Tensor, parameter: Tensor) -> Any:
        """What the optimizer remembers of a piece, element by element, is itself a piece."""
        if self.whole or not isinstance(value, Tensor) or not isinstance(parameter, DTensor) or value.shape != plain.shape:
            return value
        return dtensor_wrapper(parameter.device_mesh, parameter.placements, tuple(parameter.shape), value.dtype)(value)

    def _release(self) -> None:
        """Between steps whole parameters take no memory."""
        for plain in self._plain:
            plain.data, plain.grad = plain.data.new_empty(0), None


def _local(value: Any) -> Any:
    return local_of(value) if isinstance(value, DTensor) else value


def _without_params(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


# ---- which optimizers may step on pieces ----------------------------------------------------------------------------


def acts_on_elements(kind: type[Optimizer], options: Mapping[str, Any], device: torch.device) -> bool:
    """Whether an optimizer treats every element for itself, found by `STEPS` steps on a small matrix and on its pieces.

    Raises:
        AutotpError: it cannot be tried: its constructor or its step fails on a matrix of float64.
    """
    options = _taken(kind, options)
    if options.get("lr") is not None:
        options["lr"] = 1e-2  # a schedule may begin at zero
    random = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(1 + STEPS, 4, 6, generator=random, dtype=torch.float64).to(device)
    try:
        whole = _stepped(kind, options, start, gradients)
        for dim in (0, 1):
            pieces = [
                _stepped(kind, options, *parts)
                for parts in zip(start.chunk(2, dim), zip(*(gradient.chunk(2, dim) for gradient in gradients)), strict=True)
            ]
            if not (torch.cat(pieces, dim) - whole).abs().max() <= TOLERANCE * (whole - start).abs().max():
                return False
    except Exception as error:
        raise AutotpError(
            f"the optimizer {kind.__name__} cannot be tried on a small matrix ({type(error).__name__}: {error}), so nobody knows if it "
            "may step on pieces of parameters; use one that is made from parameters and options alone"
        ) from error
    return True


def _stepped(kind: type[Optimizer], options: Mapping[str, Any], start: Tensor, gradients: Iterable[Tensor]) -> Tensor:
    """A parameter after steps with these gradients."""
    parameter = nn.Parameter(start.clone())
    made: Any = kind([parameter], **options)
    closure = inspect.signature(kind.step).parameters.get("closure")
    needed = closure is not None and closure.default is inspect.Parameter.empty
    generators = {generator_of(device) for device in (torch.device("cpu"), start.device)}
    states = {generator: generator.get_state() for generator in generators}
    try:
        for generator in generators:
            generator.manual_seed(0)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            made.step(partial(_linear_loss, parameter, gradient)) if needed else made.step()
    finally:
        for generator, state in states.items():
            generator.set_state(state)
    return parameter.detach()


def runs_on_dtensors(kind: type[Optimizer], options: Mapping[str, Any], device_mesh: DeviceMesh) -> bool:
    """Whether `DTensor` has all operators of an optimizer, found by two steps. All ranks of the mesh must call it."""
    placements = (Shard(0), *(Replicate() for _ in range(device_mesh.ndim - 1)))
    ranks, options = device_mesh.shape[0], _taken(kind, options)

    def show(value: float) -> Tensor:
        local = torch.full((1, 3), value, dtype=torch.float64, device=device_mesh.device_type)
        return dtensor_wrapper(device_mesh, placements, (ranks, 3), local.dtype)(local)

    parameter = nn.Parameter(show(1.0))
    try:
        made = kind([parameter], **options)
        for value in (0.1, -0.2):
            parameter.grad = show(value)
            made.step()
    except Exception:
        return False
    return True


def _taken(kind: type[Optimizer], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the class takes."""
    taken = inspect.signature(kind.__init__).parameters
    several = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
    return {key: value for key, value in options.items() if several or key in taken}


def _linear_loss(parameter: Tensor, gradient: Tensor) -> Tensor:
    return (parameter.detach() * gradient).sum()


def watch_steps(module: ParallelModule) -> None:
    """Before every step of an optimizer that has parameters of `module`, let the module look at it, as long as there is the module."""
    reference = weakref.ref(module)

    def look(optimizer: Optimizer, *_: Any) -> None:
        watched = reference()
        if watched is not None:
            watched.check_optimizer(optimizer)

    weakref.finalize(module, register_optimizer_step_pre_hook(look).remove)


def check_step(optimizer: Optimizer, split: Mapping[int, str], device_mesh: DeviceMesh) -> None:
    """Refuse an optimizer that needs whole tensors, or plain ones; `split` names the parameters of which ranks hold pieces, by `id`.

    Raises:
        AutotpError: it does, or nobody can tell.
    """
    if isinstance(optimizer, BesideOptimizer):
        return
    kind = type(optimizer)
    for group in optimizer.param_groups:
        ours = next((parameter for parameter in group["params"] if id(parameter) in split), None)
        if ours is None:
            continue
        options = {**optimizer.defaults, **_without_params(group)}
        why = ""
        if not acts_on_elements(kind, options, ours.device):
            why = f"looks at whole tensors, and ranks hold pieces of '{split[id(ours)]}'"
        elif not runs_on_dtensors(kind, options, device_mesh):
            why = "uses an operator that PyTorch's DTensor lacks"
        if why:
            raise AutotpError(f"{kind.__name__} {why}; make it with autotp.optimizer({kind.__name__}, module, ...)")
