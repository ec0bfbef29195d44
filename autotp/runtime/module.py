"""The module that users hold: parameters under their old names, the sharded graph behind `forward`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autotp._torch import dtensor_wrapper, gradient_hooks, local_of, tree_unflatten
from autotp.errors import AutotpError
from autotp.runtime.accumulation import Accumulation
from autotp.runtime.agreement import agree_on, exchanging
from autotp.runtime.arguments import Arguments
from autotp.runtime.collectives import bind
from autotp.runtime.comm import ProcessComm
from autotp.runtime.exact_random import ExactCall, check_in_step, random_state, set_random_state
from autotp.runtime.function import plain_function
from autotp.runtime.optimizers import check_step, watch_steps
from autotp.runtime.outer import lies_alike, unsharded
from autotp.runtime.outputs import Outputs
from autotp.runtime.state import Container, as_dtensor, gather_full, local_part, placements
from autotp.runtime.weights import StoredTensor
from autotp.sharded import Sharded, StateSpec


class ParallelModule(Container):
    """One rank's part of a model, trained and saved like the model itself.

    `parameters()` are DTensors of the original names, global shapes and ties, so that `torch.optim` optimizers,
    `clip_grad_norm_` and distributed checkpoints see the whole model. The graph computes on plain local tensors that
    share their storage; after `backward()` every gradient is found in `parameter.grad`, a DTensor too. Whatever changes
    parameters in place is seen by the forward. The graph does not read the DTensors themselves, so that
    `torch.autograd.grad` with respect to a parameter is not possible.

    Freezing a parameter (`requires_grad_(False)`) is honoured; do it on all ranks. The mode of a submodule cannot be
    changed: it is part of the graph.

    Args:
        sharded: the graph of this rank and what lies where; its collectives are bound to `device_mesh`.
        device_mesh: of the sizes `sharded.mesh`.
        values: full value of each parameter, buffer and constant by name, read one at a time, so that a mapping may
            load lazily; or a DTensor made by `as_dtensor`, or a tensor in a file.
        aliases: second name of a tied parameter or buffer → its first name.
        persistent: the names of the buffers that belong to the `state_dict`.
        device: where the local tensors live.
        signature: of the original `forward`, without `self`; lets arguments be passed by position or by keyword.
        trained_mode: `training` of the traced model; None if its graph is the same in both modes.
        beside: a module on the same mesh, of another graph of the same model, whose parameters and buffers this one uses too: the
            same memory, in the same layouts. Of `values`, only the constants are then read.
        twin: whether it is this very module, in its other mode: gradients too go to the parameters of `beside`.
        other: makes the graph of the other mode and its constants, when the module is first called in it; all ranks then call it.

    Raises:
        AutotpError: the mesh, a value or an alias does not fit `sharded`.
    """

    def __init__(
        self,
        sharded: Sharded,
        device_mesh: DeviceMesh,
        values: Mapping[str, Tensor | StoredTensor],
        aliases: Mapping[str, str],
        persistent: frozenset[str],
        device: torch.device | str,
        *,
        signature: inspect.Signature | None = None,
        trained_mode: bool | None = None,
        beside: ParallelModule | None = None,
        twin: bool = False,
        other: Callable[[], tuple[Sharded, Mapping[str, Tensor]]] | None = None,
    ) -> None:
        super().__init__()
        _check_mesh(sharded, device_mesh)
        self._sharded, self._device_mesh = sharded, device_mesh
        self._aliases, self._persistent = dict(aliases), persistent
        self._device = torch.empty(0, device=device).device
        self._signature, self._trained_mode = signature, trained_mode

        order = {name: place for place, name in enumerate(values)}  # parameters() counts as the original model does
        slots: tuple[_Slot, ...] = () if beside is None else beside._held
        present = {slot.spec.name: slot for slot in slots if slot.spec.kind != "constant"}
        held = {
            spec.name: _twin_slot(spec, present) if twin and spec.name in present else self._hold(spec, self._local(spec, values, present))
            for spec in sorted(sharded.state, key=lambda spec: order.get(spec.name, len(order)))
        }
        for name, first in aliases.items():
            if first not in held:
                raise AutotpError(
                    f"'{name}' is tied to '{first}', which is no state of the graph; tie it to {sorted(held)[:5]}"
                )
            held[first].ties.append(self._register(name, held[first].shown, held[first].spec))
        unknown = sorted(set(values) - set(held) - set(aliases))
        if unknown:
            raise AutotpError(f"a value is given for '{unknown[0]}', which is no state of the graph; leave it out")
        self._held: tuple[_Slot, ...] = tuple(held[spec.name] for spec in sharded.state)
        self._updated = tuple(held[name].leaf for name in sharded.updates)
        for name in set(sharded.updates) - sharded.in_place:
            held[name].changes = True
        self._arguments = Arguments(sharded, self._device, signature)
        self._outputs: list[Any] = [sharded.out_constants.get(i) for i in range(sharded.out_spec.num_leaves)]
        self._border = Outputs(sharded, device_mesh)
        self._places = tuple(spec.position for spec in sharded.outputs)
        if trained_mode is not None:
            self.train(trained_mode)
        leaves = {id(slot.leaf): (slot.shown, slot.spec.name) for slot in self._held if slot.spec.kind == "parameter"}
        self._accumulation: Accumulation = beside._accumulation if beside is not None and twin else Accumulation(leaves)
        bind(sharded.graph, ProcessComm(device_mesh), self._accumulation)
        self._exact = any(isinstance(child, ExactCall) for child in sharded.graph.modules())
        self._run = plain_function(sharded.graph)
        self._checked = WeakKeyDictionary[torch.optim.Optimizer, tuple[int, ...]]()
        self._other, self._twin = other, dict[str, ParallelModule]()
        if not twin:
            watch_steps(self)
        self._met: set[tuple[torch.Size, ...]] = set()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs, in the structure that it returns.

        The arguments are those of the original forward, of the same dtypes, dims and static sizes as in the example.
        Inputs and outputs are full tensors, except those declared sharded or partial: such an input is this rank's part, such an output
        a DTensor.

        Raises:
            AutotpError: an argument, the mode or a replaced parameter does not fit the traced graph.
        """
        if self._trained_mode is not None and self.training is not self._trained_mode:
            if self._other is not None:
                return self._in_other_mode(self._other).forward(*args, **kwargs)
            modes = ("train", "eval") if self._trained_mode else ("eval", "train")
            raise AutotpError(
                f"the graph was traced in {modes[0]} mode and the module is in {modes[1]} mode; call .{modes[0]}(), "
                f"or make the model parallel again after .{modes[1]}()"
            )
        inputs = self._arguments.match(args, kwargs)
        if not torch.compiler.is_compiling():
            self._meet(inputs)
            if self._exact:
                check_in_step(self._device_mesh)
        # what autograd keeps of a buffer that changes below must keep its old values
        state = [slot.read().clone() if slot.changes else slot.read() for slot in self._held]
        results = self._run(*state, *inputs)
        leaves = self._outputs.copy()
        shown = self._border.shown(list(results[: len(self._places)]), inputs)
        for position, value in zip(self._places, shown, strict=True):
            leaves[position] = value
        if self._updated:
            with torch.no_grad():
                for buffer, value in zip(self._updated, results[len(self._places) :], strict=True):
                    if value is not buffer:  # as it is where the graph writes in place
                        buffer.copy_(value)
        return tree_unflatten(leaves, self._sharded.out_spec)

    def _in_other_mode(self, make: Callable[[], tuple[Sharded, Mapping[str, Tensor]]]) -> ParallelModule:
        """This module with the graph of its other mode, made when it is first needed."""
        if "other" not in self._twin:
            sharded, constants = make()
            self._twin["other"] = ParallelModule(
                sharded,
                self._device_mesh,
                constants,
                {},
                self._persistent,
                self._device,
                signature=self._signature,
                trained_mode=not self._trained_mode,
                beside=self,
                twin=True,
            )
        return self._twin["other"]

    def spec_of(self, parameter: Tensor) -> StateSpec:
        """The name, global type and layout of one of the parameters.

        Raises:
            AutotpError: it is not one of this module's.
        """
        for slot in self._held:
            if slot.shown is parameter:
                return slot.spec
        raise AutotpError(
            f"a parameter of shape {tuple(parameter.shape)} is not one of this parallel module's; pass those of module.parameters()"
        )

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before each step of any optimizer: refuse one that would step otherwise on pieces of parameters than on the whole.

        Raises:
            AutotpError: it would, or nobody can tell; or gradients are not reduced yet.
        """
        self._accumulation.check(optimizer)
        sizes = tuple(len(group["params"]) for group in optimizer.param_groups)
        if self._checked.get(optimizer) != sizes:
            check_step(optimizer, self._in_pieces(), self._device_mesh)
            self._checked[optimizer] = sizes

    def _in_pieces(self) -> dict[int, str]:
        """The names of the parameters of which ranks hold pieces, by `id` of what is registered now: `fully_shard` cuts them all."""
        held = [(slot, slot.owner.get(slot.key)) for slot in self._held if slot.spec.kind == "parameter"]
        return {id(now): slot.spec.name for slot, now in held if slot.spec.layout.splits or now is not slot.shown}

    def _meet(self, inputs: Sequence[Tensor]) -> None:
        """Before the first exchange for inputs of these sizes: do all ranks call with the same?"""
        sizes = tuple(tensor.shape for tensor in inputs)
        if sizes in self._met:
            return
        names = [spec.name for spec in self._sharded.inputs]
        said = ", ".join(f"{name} {tuple(shape)}" for name, shape in zip(names, sizes, strict=True))
        with exchanging("the ranks of the module"):
            agree_on({"the input of this call": said}, self._device_mesh)
        self._met.add(sizes)

    def no_sync(self) -> AbstractContextManager[None]:
        """A context for all micro-steps of a gradient accumulation but the last: the gradients of parameters are not exchanged.

        They are added up as they are, beside `parameter.grad`, and join it in the first backward of a forward outside of the context: of
        a weight that is gathered for use, at its full size; of one that every rank holds, at its own. Exchanges of activations remain.
        A forward and its backward belong together: it is where the forward runs that counts. Under `torch.compile` nothing is put off.
        """
        return self._accumulation.delayed()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, also those that wait for their reduction."""
        self._accumulation.clear()
        super().zero_grad(set_to_none)

    def full_state_dict(self) -> dict[str, Tensor]:
        """The `state_dict` of the original model: plain full tensors on every rank. All ranks must call it."""
        slots = {slot.spec.name: slot for slot in self._held}
        firsts = {name: self._aliases.get(name, name) for name in self.state_dict(keep_vars=True)}
        gathered: dict[str, Tensor] = {}
        with unsharded(self):
            for first in dict.fromkeys(firsts.values()):
                slots[first].follow()
                gathered[first] = gather_full(slots[first].leaf, slots[first].spec, self._device_mesh)
        return {name: gathered[first] for name, first in firsts.items()}

    @property
    def device_mesh(self) -> DeviceMesh:
        """The ranks that run the module."""
        return self._device_mesh

    def random_state(self) -> dict[str, Tensor]:
        """Where the random numbers of the forward stand, uint8 tensors for a checkpoint; the same on every rank and any mesh.

        `seeds` is the module's own stream, from which every rank takes the seed of each random operator. Where operators draw what one
        device draws (`randomness="exact"`) it is `generator`, the state of PyTorch's generator of this device.
        """
        return random_state([self._sharded.graph, *(twin._sharded.graph for twin in self._twin.values())], self._device)

    def set_random_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `random_state` was read. All ranks must call it.

        Raises:
            AutotpError: the state is that of a module with another kind of randomness.
        """
        if self._other is not None and self.random_state().keys() != state.keys():
            self._in_other_mode(self._other)
        set_random_state([self._sharded.graph, *(twin._sharded.graph for twin in self._twin.values())], self._device, state)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled: the process groups of a mesh cannot be.

        Raises:
            AutotpError: always.
        """
        raise AutotpError(
            "a parallel module cannot be pickled, as its exchanges belong to this process; save it with autotp.save(), or save its "
            "state_dict(), or full_state_dict() for one device"
        )

    def extra_repr(self) -> str:
        """The mesh, this rank's place on it, and the state held at the top level."""
        names = self._device_mesh.mesh_dim_names
        mesh = "×".join(map(str, self._sharded.mesh)) + (f" ({', '.join(names)})" if names else "")
        lines = [f"mesh: {mesh}; this rank: {self._sharded.coordinate}; device: {self._device}", super().extra_repr()]
        return "\n".join(line for line in lines if line)

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelModule:
        """A module of its own with copies of the values, on the same graph and mesh (for averages of weights)."""
        values = {slot.spec.name: as_dtensor(slot.leaf, slot.spec, self._device_mesh) for slot in self._held}
        copied = ParallelModule(
            self._sharded,
            self._device_mesh,
            values,
            self._aliases,
            self._persistent,
            self._device,
            signature=self._signature,
            trained_mode=self._trained_mode,
            other=self._other,
        )
        for mine, theirs in zip(self.parameters(), copied.parameters(), strict=True):
            theirs.requires_grad_(mine.requires_grad)
        memo[id(self)] = copied.train(self.training)
        return copied

    def _local(self, spec: StateSpec, values: Mapping[str, Tensor | StoredTensor], present: Mapping[str, _Slot]) -> Tensor:
        """This rank's part of one state tensor: that of the module beside, or cut out of its value."""
        if spec.name in present:
            return _shared(spec, present[spec.name])
        return _local_value(spec, values, self._sharded, self._device)

    def _hold(self, spec: StateSpec, local: Tensor) -> _Slot:
        """Register the local tensor as what users see, and the leaf that the graph reads."""
        if spec.kind == "constant":
            return _Slot({spec.name: local}, spec.name, spec, local)
        wrap = dtensor_wrapper(self._device_mesh, placements(spec.layout), spec.type.hint, spec.type.dtype)
        if spec.kind == "buffer":
            shown = wrap(local) if spec.layout.splits else local
            return _Slot(*self._register(spec.name, shown, spec), spec, shown)
        parameter = nn.Parameter(wrap(local), requires_grad=spec.type.requires_grad)
        return _Slot(*self._register(spec.name, parameter, spec), spec, parameter, wrap)

    def _register(self, name: str, tensor: Tensor, spec: StateSpec) -> tuple[Mapping[str, Any], str]:
        """Put a tensor under its dotted name; the dict that now holds it, and its key there."""
        *path, key = name.split(".")
        owner: Container = self
        for part in path:
            owner = owner.child(part)
        owner.place(key, tensor, spec, self._device_mesh, persistent=name in self._persistent)
        return owner._parameters if isinstance(tensor, nn.Parameter) else owner._buffers, key


class _Slot:
    """One state tensor: `shown` is registered as `owner[key]`, the graph reads `leaf`; both lie on the same storage.

    `wrap` shows a gradient of the leaf as one of the parameter.
    """

    def __init__(
        self, owner: Mapping[str, Any], key: str, spec: StateSpec, shown: Tensor, wrap: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.owner, self.key, self.spec, self.wrap = owner, key, spec, wrap
        self.ties: list[tuple[Mapping[str, Any], str]] = []
        self.changes = False
        self._take(shown)

    def _take(self, shown: Tensor) -> None:
        self.shown = shown
        self.local = local_of(shown) if isinstance(shown, DTensor) else None
        self.leaf = shown if self.local is None else self.local
        if isinstance(shown, nn.Parameter):
            self.leaf = self.leaf.detach()
        if self.wrap is not None and self.spec.type.requires_grad:
            self.leaf.requires_grad_().register_post_accumulate_grad_hook(_gradient_mover(shown, self.wrap))
        self.frozen = self.leaf.detach() if self.leaf.requires_grad else self.leaf

    def follow(self) -> None:
        """Look at what is registered now: `fully_shard`, for one, puts gathered parameters in the place of others.

        Raises:
            AutotpError: it is a tensor that does not lie as the graph needs it.
        """
        held: Any = self.owner.get(self.key)
        if held is self.shown and (self.local is None or local_of(held) is self.local):
            return
        tied = all(owner.get(key) is held for owner, key in self.ties)
        if isinstance(held, DTensor) and isinstance(self.shown, DTensor) and held.device_mesh != self.shown.device_mesh:
            raise AutotpError(
                f"fully_shard has {self.spec.kind} '{self.spec.name}' in pieces; apply it to the parallel module as a whole, not to parts "
                "of it, and call that module"
            )
        if held is self.shown or self.wrap is None or not tied or not lies_alike(held, self.shown):
            raise AutotpError(
                f"{self.spec.kind} '{self.spec.name}' was replaced by another tensor, which the graph does not read; copy new "
                f"values into it instead, with load_state_dict() or, under torch.no_grad(), copy_()"
            )
        self._take(held)

    def read(self) -> Tensor:
        """What the graph computes with: the leaf, or its values alone where users froze the parameter."""
        self.follow()
        if not self.shown.requires_grad:
            return self.frozen
        if not self.spec.type.requires_grad:
            raise AutotpError(
                f"{self.spec.kind} '{self.spec.name}' was frozen when the model was traced, so the graph has no gradient for it; "
                f"call requires_grad_(False) on it, or make the model parallel again with it trainable"
            )
        return self.leaf


def _gradient_mover(parameter: Tensor, wrap: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    """A hook for the local leaf that adds each new gradient to `parameter.grad`, as autograd would have done."""

    def move(leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        if gradient is None or not parameter.requires_grad:
            return
        if gradient.requires_grad:
            raise AutotpError("a parallel module has no second derivatives; call backward() without create_graph=True")
        before, after = gradient_hooks(parameter)
        if before:
            shown = wrap(gradient)
            for hook in tuple(before.values()):
                replaced = hook(shown)
                shown = shown if replaced is None else replaced
            gradient = local_of(shown)
        held = parameter.grad
        if held is None:
            parameter.grad = wrap(gradient)
        else:
            local_of(held).add_(gradient)
        if after:
            for hook in tuple(after.values()):
                hook(parameter)

    return move


def _check_mesh(sharded: Sharded, device_mesh: DeviceMesh) -> None:
    coordinate = device_mesh.get_coordinate()
    if tuple(device_mesh.shape) != sharded.mesh:
        raise AutotpError(
            f"the plan is for a mesh of {sharded.mesh}, the device mesh has {tuple(device_mesh.shape)}; "
            f"plan for the latter"
        )
    if coordinate is None or tuple(coordinate) != sharded.coordinate:
        raise AutotpError(
            f"the graph is that of the rank at {sharded.coordinate}, this rank is at {coordinate}; "
            f"rewrite it for this one"
        )


def _twin_slot(spec: StateSpec, present: Mapping[str, _Slot]) -> _Slot:
    """The slot of the module whose twin this is."""
    _shared(spec, present[spec.name])
    return present[spec.name]


def _shared(spec: StateSpec, slot: _Slot) -> Tensor:
    """The local tensor of another module's slot, if it lies as it must lie here."""
    if (slot.spec.type, slot.spec.layout) != (spec.type, spec.layout):
        raise AutotpError(
            f"{spec.kind} '{spec.name}' rests as ({spec.layout}) here and as ({slot.spec.layout}) in the module that has its memory; "
            "plan the one with the layouts of the other"
        )
    return slot.leaf.detach()


def _local_value(spec: StateSpec, values: Mapping[str, Tensor | StoredTensor], sharded: Sharded, device: torch.device) -> Tensor:
    """This rank's part of one state tensor: a copy on `device`, checked to be of the planned type."""
    if spec.kind == "parameter" and spec.type.requires_grad and set(spec.layout.kinds) - {"I", "S"}:
        raise AutotpError(f"parameter '{spec.name}' rests as {spec.layout}; a trainable parameter rests as I or S")
    try:
        value = values[spec.name]
    except KeyError:
        raise AutotpError(f"no value is given for {spec.kind} '{spec.name}'; give the full tensor") from None
    if not isinstance(value, Tensor):
        return value.local_part(spec.layout, sharded.mesh, sharded.coordinate, spec.type.dtype, device)
    if (tuple(value.shape), value.dtype) != (spec.type.hint, spec.type.dtype):
        raise AutotpError(
            f"the value of {spec.kind} '{spec.name}' is {value.dtype} of shape {tuple(value.shape)}, but the plan was "
            f"made for {spec.type.dtype} of shape {spec.type.hint}; give that, or plan again"
        )
    if value.is_meta:
        raise AutotpError(
            f"the value of {spec.kind} '{spec.name}' is on the meta device and has no data; load the weights first"
        )
    if isinstance(value, DTensor):
        return local_of(value).detach().clone().to(device)
    return local_part(value, spec.layout, sharded.mesh, sharded.coordinate).to(device)
