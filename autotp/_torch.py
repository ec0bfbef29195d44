"""The one place for PyTorch APIs that are not public, so that a new release of PyTorch breaks one file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

tree_flatten = pytree.tree_flatten
tree_unflatten = pytree.tree_unflatten
tree_map_only = pytree.tree_map_only
tree_flatten_with_path = pytree.tree_flatten_with_path
TreeSpec = pytree.TreeSpec

GRAD_REGION = torch.ops.higher_order.wrap_with_set_grad_enabled
AUTOCAST_REGION = torch.ops.higher_order.wrap_with_autocast


def fake_mode_of(tensors: Iterable[torch.Tensor]) -> FakeTensorMode | None:
    """The mode of the first fake tensor among `tensors`, or None."""
    return next((tensor.fake_mode for tensor in tensors if isinstance(tensor, FakeTensor)), None)


def new_fake_mode() -> FakeTensorMode:
    """A fresh fake mode that lets real tensors (lifted constants) take part."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def to_fake(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """A fake tensor of `mode` with the metadata of `tensor`; for one on `meta` it pretends to be on the CPU."""
    if isinstance(tensor, FakeTensor):
        return tensor
    if tensor.device.type == "meta":
        return FakeTensor(mode, tensor.detach(), torch.device("cpu")).requires_grad_(tensor.requires_grad)
    return mode.from_tensor(tensor, static_shapes=True)


def with_state(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> AbstractContextManager[None]:
    """A context in which `model` holds the tensors of `state` in place of its own."""
    context: AbstractContextManager[None] = _reparametrize_module(model, dict(state), tie_weights=True)
    return context


def storage_key(tensor: torch.Tensor) -> int:
    """The same number for two tensors, real or fake, exactly if they share memory."""
    return int(tensor.untyped_storage()._cdata)


def is_mutable(target: Any) -> bool:
    """Whether an operator writes to one of its inputs, by its schema."""
    return isinstance(target, torch._ops.OpOverload) and bool(target._schema.is_mutable)


def mutated_positions(target: torch._ops.OpOverload) -> tuple[int, ...]:
    """Positions of the arguments that an operator writes to."""
    return tuple(
        index
        for index, arg in enumerate(target._schema.arguments)
        if arg.alias_info is not None and arg.alias_info.is_write
    )


def returns_its_input(target: torch._ops.OpOverload) -> bool:
    """Whether the operator is a plain in-place one: it writes to its first argument alone and returns that."""
    return mutated_positions(target) == (0,) and len(target._schema.returns) == 1


def functional_variant(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """`aten.add.Tensor` for `aten.add_.Tensor`; None where there is no such operator."""
    namespace, _, name = target._schema.name.partition("::")
    if not name.endswith("_"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    variant = getattr(packet, target._overloadname, None)
    if variant is None:
        return None
    ours, theirs = target._schema.arguments, variant._schema.arguments
    return variant if [arg.name for arg in ours[1:]] == [arg.name for arg in theirs[1:]] else None


def is_random(target: Any) -> bool:
    """Whether two calls with equal arguments may differ; a plain function is taken to be deterministic."""
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def expression(number: Any) -> Any:
    """The sympy expression of a SymInt, SymFloat or SymBool; any other value as it is."""
    return number.node.expr if isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)) else number


def equations(number: torch.SymInt) -> list[sympy.Eq]:
    """The equations between sizes that the trace relied on (guards and run-time asserts of the size's environment)."""
    environment = number.node.shape_env
    found = [guard.expr for guard in environment.guards]
    for deferred in environment.deferred_runtime_asserts.values():
        found.extend(item.expr for item in deferred)
    return [expr for expr in found if isinstance(expr, sympy.Eq)]


def dtensor_wrapper(
    device_mesh: Any, placements: tuple[Any, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that shows a local tensor as a DTensor of this global shape, in a tenth of `from_local`'s time."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    stride = torch.empty(shape, device="meta").stride()
    spec = DTensorSpec(device_mesh, placements, tensor_meta=TensorMeta(torch.Size(shape), stride, dtype))

    new = DTensor.__new__  # without DTensor.__init__, which does nothing and costs half the time

    def wrap(local: torch.Tensor) -> torch.Tensor:
        return new(DTensor, local, spec, requires_grad=False)

    return wrap


def local_of(tensor: Any) -> torch.Tensor:
    """The local tensor of a DTensor, itself and not an alias."""
    local: torch.Tensor = tensor._local_tensor
    return local


def gradient_hooks(tensor: torch.Tensor) -> tuple[Mapping[int, Any] | None, Mapping[int, Any] | None]:
    """What was registered with `register_hook` and with `register_post_accumulate_grad_hook`, by handle."""
    return tensor._backward_hooks, tensor._post_accumulate_grad_hooks


# functional collectives: they do not modify their input, run on Gloo and NCCL, and torch.compile traces them
all_reduce = torch.ops._c10d_functional.all_reduce.default
all_gather = torch.ops._c10d_functional.all_gather_into_tensor.default
reduce_scatter = torch.ops._c10d_functional.reduce_scatter_tensor.default
all_to_all = torch.ops._c10d_functional.all_to_all_single.default
wait_tensor = torch.ops._c10d_functional.wait_tensor.default


def constant_when_compiled(function: Callable[..., Any]) -> None:
    """Mark a function as `torch.compiler.assume_constant_result` does, without importing the compiler (a second)."""
    function.__dict__["_dynamo_marked_constant"] = True


below_autograd = torch._C._AutoDispatchBelowAutograd
"""A context in which operators skip autograd's own layer."""


def assert_all(condition: torch.Tensor, message: str) -> None:
    """Raise RuntimeError unless every element is true, without making the host wait for a GPU."""
    torch._assert_async(condition.all(), message)
