"""The one place for PyTorch APIs that are not public, so that a new release of PyTorch breaks one file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, get_proxy_slot
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

tree_flatten = pytree.tree_flatten
tree_unflatten = pytree.tree_unflatten
tree_map_only = pytree.tree_map_only
tree_flatten_with_path = pytree.tree_flatten_with_path
TreeSpec = pytree.TreeSpec


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """(name, leaf) of what is nested in dicts, tuples and lists; a name lists the keys on the way."""
    return [(".".join(str(key) for key in map(_key, path)), leaf) for path, leaf in pytree.tree_flatten_with_path(tree)[0]]


def _key(entry: Any) -> Any:
    return next((getattr(entry, name) for name in ("key", "name", "idx") if hasattr(entry, name)), entry)


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


@contextmanager
def with_state(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """A context in which `model` holds the tensors of `state` in place of its own, under every name that a tensor has.

    PyTorch's own way loses the parameters of a module that is registered twice.
    """
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    given = {id(tensor): state[name] for name, tensor in named if name in state}
    tables: list[dict[str, Any]] = [table for module in model.modules() for table in (module._parameters, module._buffers)]
    saved = [(table, dict(table)) for table in tables]
    try:
        for table in tables:
            for key, tensor in table.items():
                table[key] = given.get(id(tensor), tensor)
        yield
    finally:
        for table, held in saved:
            table.clear()
            table.update(held)


def storage_key(tensor: torch.Tensor) -> int:
    """The same number for two tensors, real or fake, exactly if they share memory."""
    return int(tensor.untyped_storage()._cdata)


def saved_tensor_hooks() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """The (pack, unpack) hooks through which autograd saves tensors now, if any."""
    found: tuple[Callable[..., Any], Callable[..., Any]] | None = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return found


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


def in_place_variant(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """`aten.add_.Tensor` for `aten.add.Tensor`: the inverse of `functional_variant`; None where there is no such operator."""
    namespace, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), f"{name}_", None)
    variant: torch._ops.OpOverload | None = getattr(packet, target._overloadname, None)
    return variant if variant is not None and returns_its_input(variant) and functional_variant(variant) is target else None


def overload_of_custom_op(op: Any) -> Any:
    """The overload that `torch.library.custom_op` defined; anything else as it is."""
    from torch._library.custom_ops import CustomOpDef

    return op._opoverload if isinstance(op, CustomOpDef) else op


def fill_compiler_tables() -> None:
    """Let the compiler note the functions that it knows, as an export does anyway, before one of them is replaced for a while."""
    from torch._dynamo import trace_rules

    trace_rules.get_torch_obj_rule_map()


def is_vmap(target: Any) -> bool:
    """Whether a function in a traced graph opens or closes a `torch.vmap`."""
    return getattr(target, "__module__", "") == "torch._functorch.predispatch"


def is_random(target: Any) -> bool:
    """Whether two calls with equal arguments may differ; a plain function is deterministic unless its `random` says not."""
    if not isinstance(target, torch._ops.OpOverload):
        return bool(getattr(target, "random", False))
    return torch.Tag.nondeterministic_seeded in target.tags


def is_traced(leaves: Iterable[Any]) -> bool:
    """Whether an export records what is done to these values now."""
    return get_proxy_mode() is not None and any(isinstance(leaf, FakeTensor) for leaf in leaves)


@contextmanager
def untraced() -> Iterator[None]:
    """A context in which an export that is under way records nothing."""
    with disable_proxy_modes_tracing(), torch._C.DisableTorchFunction():
        yield


unwatched = torch._C.DisableTorchFunction
"""A context in which asking tensors for their types is seen by no function mode (and costs a twentieth)."""


DispatchMode = TorchDispatchMode
"""A context whose `__torch_dispatch__` sees every operator inside, as autograd leaves it."""


class OperandWatch(TorchDispatchMode):
    """Sees whether operators inside read tensors other than `given` and what is made of them, or draw random numbers."""

    def __init__(self, given: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.known = list(given)
        self.keys = {storage_key(tensor) for tensor in self.known}
        self.foreign = self.random = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the operands, then run the operator."""
        operands = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        lifted = func is torch.ops.aten.lift_fresh.default
        self.foreign |= not lifted and any(storage_key(operand) not in self.keys for operand in operands)
        self.random |= is_random(func)
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, torch.Tensor)]
        self.known += made  # alive, so that no other tensor gets their keys
        self.keys.update(map(storage_key, made))
        return result


@contextmanager
def operator_library() -> Iterator[torch.library.Library]:
    """A place for operators that exist for the time of one trace."""
    library = torch.library.Library("autotp_trace", "FRAGMENT")
    try:
        yield library
    finally:
        library._destroy()


def define_operator(
    library: torch.library.Library, number: int, outputs: Sequence[torch.Tensor], *, differentiable: bool = False
) -> Any:
    """A new operator of tensors and sizes, which in a trace gives new tensors like `outputs`.

    If `differentiable`, these require gradients where an operand does (which in a trace nobody computes).
    """
    name = f"call_{id(library)}_{number}"
    library.define(f"{name}(Tensor[] tensors, SymInt[] sizes) -> Tensor[]")
    likes = [(tuple(out.shape), tuple(out.stride()), out.dtype, out.device) for out in outputs]

    def fake(tensors: list[torch.Tensor], sizes: list[Any]) -> list[torch.Tensor]:
        return [torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype, device in likes]

    def backward(*_: Any) -> Any:
        raise NotImplementedError

    library._register_fake(name, fake)
    if differentiable:
        torch.library.register_autograd(f"autotp_trace::{name}", backward, lib=library)
    return getattr(torch.ops.autotp_trace, name).default


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


def own_chunks(tensor: Any) -> list[Any]:
    """The chunks that a DTensor tells `torch.distributed.checkpoint` of."""
    found: list[Any] = type(tensor).__create_chunk_list__(tensor)
    return found


def describe_chunks(
    tensor: torch.Tensor, write_items: Callable[..., Any], chunk_list: Callable[..., Any], shard: Callable[..., torch.Tensor]
) -> None:
    """Let one tensor answer `torch.distributed.checkpoint` itself (`torch.distributed._checkpointable`), in place of its class."""
    vars(tensor).update({"__create_write_items__": write_items, "__create_chunk_list__": chunk_list, "__get_tensor_shard__": shard})


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


def inherit_timeout(group: Any) -> None:
    """Give a process group the timeout that the default group has; a new one otherwise waits for half an hour."""
    from torch.distributed import distributed_c10d as c10d

    whole = c10d._get_default_group()
    if group is not whole:
        device = whole._device_types[0]
        c10d._set_pg_timeout(whole._get_backend(device).options._timeout, group)


below_autograd = torch._C._AutoDispatchBelowAutograd
"""A context in which operators skip autograd's own layer."""


def assert_all(condition: torch.Tensor, message: str) -> None:
    """Raise RuntimeError unless every element is true, without making the host wait for a GPU."""
    torch._assert_async(condition.all(), message)


def is_composite(target: torch._ops.OpOverload) -> bool:
    """Whether PyTorch composes the operator of others, on every device and for autograd, without writing to its inputs."""
    name, key = target.name(), "CompositeImplicitAutograd"
    known = torch._C._dispatch_has_kernel(name)  # not so for the overloads on plain numbers
    return known and torch._C._dispatch_has_kernel_for_dispatch_key(name, key) and not target._schema.is_mutable


def traced_call(function: Callable[..., Any], values: list[Any]) -> torch.fx.Graph:
    """The graph of the basic operators that `function` calls on fake tensors and sizes; each node holds its value as `meta["val"]`."""
    from torch.fx.experimental.proxy_tensor import make_fx

    mode = fake_mode_of(value for value in values if isinstance(value, torch.Tensor))
    with torch.no_grad(), mode or new_fake_mode():
        graph = make_fx(function)(*values).graph
    graph.eliminate_dead_code()
    return graph


CAUSAL_SEARCH = (torch.nn.modules.transformer, "_detect_is_causal_mask")
"""Where `nn.TransformerEncoder` and its kin compare a mask's values with a causal one's."""


def index_function() -> tuple[Any, str]:
    """What indexing with traced indices calls in functions under `torch.vmap`: its module (slow to import) and name."""
    from torch._dynamo import _trace_wrapped_higher_order_op

    return _trace_wrapped_higher_order_op, "mod_index"


def plain_modules(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """(name, module) for a module and all inside it, under every name, read past what an export puts in their place."""
    yield "", module
    for label, child in vars(module)["_modules"].items():
        if child is not None:
            for name, part in plain_modules(child):
                yield f"{label}.{name}".rstrip("."), part


def hooks_of(module: torch.nn.Module) -> bool:
    """Whether any hook runs when the module is called."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(vars(module)[name] for name in names)


def global_hooks() -> bool:
    """Whether hooks run when any module is called."""
    return bool(torch.nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]


def surroundings() -> tuple[Any, ...]:
    """What of PyTorch's state an operator's recording depends on: modes, gradients, defaults."""
    modes = tuple(map(id, torch.overrides._get_current_function_mode_stack()))
    return torch.is_grad_enabled(), torch._C._is_any_autocast_enabled(), torch.get_default_dtype(), modes


class Recording:
    """The graph of the export that is under way."""

    def __init__(self) -> None:
        """Raises LookupError if there is none."""
        mode = get_proxy_mode()
        if mode is None or not hasattr(mode.tracer, "graph"):
            raise LookupError
        self.tracer = mode.tracer
        self.graph: torch.fx.Graph = mode.tracer.graph

    def node(self, tensor: torch.Tensor) -> torch.fx.Node | None:
        """The node that stands for a tensor, or None for a constant."""
        slot = get_proxy_slot(tensor, self.tracer, None)
        return None if slot is None else slot.proxy.node

    def last(self) -> torch.fx.Node:
        """The node that was appended last."""
        node: torch.fx.Node = next(iter(reversed(self.graph.nodes)))
        return node
