"""Peak memory of one rank: its graph walked through a step with storages in the place of values.

Forward, backward (in the reverse order, as autograd's engine does) and the optimizer's update; every storage is counted from birth to
death, by what keeps it alive. What each call does to memory is observed (`footprint.py`); a repeated block is walked for each of its
copies, but its calls are observed once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx import GraphModule

from autotp.flights import Alone, Journey
from autotp.footprint import Call, Observer, Slot, Spec, contiguous
from autotp.layouts import Layout, at_sizes, local_shape, local_size
from autotp.ledger import PARTS, Again, Ledger, Remade, Storage
from autotp.observed import Copy, Observed, Seen
from autotp.plans import MemoryUse
from autotp.price.memory import Optimizer
from autotp.program import TensorType
from autotp.runtime.collectives import Bucket, bind
from autotp.runtime.prefetch import Prefetch
from autotp.runtime.random import RandomCall
from autotp.runtime.recompute import Recomputing
from autotp.runtime.sorted_rows import HeldElements
from autotp.sharded import Sharded


@dataclass(eq=False)
class _Value:
    """A tensor of the walk."""

    spec: Spec
    storage: Storage


@dataclass(eq=False)
class _Early:
    """A conversion that has begun early: what is under way, held, forward and then backward; `token` stands between the two ends of
    its gradients' way. What backward makes again of the conversions `before` it begins when its gradients do."""

    journey: Journey
    operands: tuple[_Value, ...]
    token: _Value
    before: tuple[_Early | None, ...]
    values: tuple[_Value, ...] = ()
    remade: Remade | None = None
    gradients: tuple[_Value, ...] = ()

    @property
    def wanted(self) -> tuple[_Value, ...]:
        """The parameters that get a gradient."""
        return tuple(value for value, wants in zip(self.operands, self.journey.wants_gradient, strict=True) if wants)


@dataclass(frozen=True)
class _Step:
    """One call on the way back: what it was called with, what came out, and what autograd keeps for it, or makes again."""

    call: Call | _Early
    key: Any
    operands: tuple[_Value, ...]
    results: tuple[_Value | None, ...]
    kept: tuple[Storage | Remade, ...] = ()


def peak_memory(sharded: Sharded, symbols: Mapping[Any, int], optimizer: Optimizer | None, on_cpu: bool) -> MemoryUse:
    """Bytes by part at the moment of a step at which a rank holds most.

    The step is one of many: the optimizer has its state, gradients are freed before the forward (`zero_grad`), the caller holds inputs
    and outputs. If the outputs have a scalar with gradient, backward starts there, else from all outputs that have gradients.

    Args:
        sharded: the rank's graph, rewritten for the device "meta".
        symbols: every symbolic size at its traced value.
        optimizer: None for inference.
        on_cpu: see `Observer`.
    """
    return observe(sharded, symbols, optimizer, on_cpu).memory


def observe(sharded: Sharded, symbols: Mapping[Any, int], optimizer: Optimizer | None, on_cpu: bool) -> Observed:
    """`peak_memory`, and what every call of the step did to memory on the way."""
    walk = _Walk(sharded, symbols, optimizer, on_cpu)
    memory = walk.run()
    return Observed(memory, tuple(walk.seen), tuple(walk.copies))


class _Walk:
    def __init__(self, sharded: Sharded, symbols: Mapping[Any, int], optimizer: Optimizer | None, on_cpu: bool) -> None:
        self.sharded, self.symbols, self.optimizer = sharded, symbols, optimizer
        self.ledger, self.observer = Ledger(), Observer(on_cpu)
        self.tape: list[_Step] = []
        self.seen: list[Seen] = []
        self.copies: list[Copy] = []
        self.leaves: Counter[_Value] = Counter()
        """Parameters with gradient, and how many calls have yet to send them one."""
        self.marked: Mapping[str, frozenset[int]] = {}
        """The calls of the block at work that are made again in backward."""
        self.made: list[Storage] = []
        self.calls = 0
        self.early: dict[int, _Early] = {}
        """Calls that are made again and may begin early, by number."""
        self.schedules: dict[GraphModule, list[tuple[fx.Node, tuple[fx.Node, ...]]]] = {}
        bind(sharded.graph, Alone(sharded.mesh))

    def run(self) -> MemoryUse:
        """Walk one step."""
        arguments = [*self.state(), *self.inputs()]
        self.hold(arguments)
        results = self.graph(self.sharded.graph, arguments)
        outputs = results[: len(self.sharded.outputs)]
        self.release((arguments, results[len(self.sharded.outputs) :]))
        if self.optimizer is not None:
            self.backward(outputs)
            self.update()
        return MemoryUse(**{part: float(self.ledger.peak[part]) for part in PARTS})

    # ---- what is there before the step ----

    def local(self, tensor: TensorType, layout: Layout) -> Spec:
        """What this rank holds of a tensor."""
        shape = local_shape(tensor.hint, at_sizes(layout, self.symbols), self.sharded.mesh, self.sharded.coordinate)
        return contiguous(shape, tensor.dtype, tensor.requires_grad and self.optimizer is not None)

    def state(self) -> list[_Value]:
        """Parameters, buffers and constants; a buffer that the forward changes is read as a copy, unless it is written in place."""
        found = []
        copied = set(self.sharded.updates) - self.sharded.in_place
        for held in self.sharded.state:
            value = self.value(self.local(held.type, held.layout))
            cache = self.optimizer is None and held.name in self.sharded.updates
            self.ledger.change(value.storage, rests="cache" if cache else "parameters")
            if value.spec.requires_grad and self.optimizer is not None:
                self.leaves[value] = 0
                state = Storage(self.optimizer.state_bytes(value.spec.shape, held.type.dtype.itemsize))
                self.ledger.change(state, rests="optimizer")
            found.append(self.value(value.spec) if held.name in copied else value)
        return found

    def inputs(self) -> list[_Value]:
        """What the caller passes, and holds."""
        found = [self.value(self.local(border.type, border.layout)) for border in self.sharded.inputs]
        for value in found:
            self.ledger.change(value.storage, held=1)
        return found

    def value(self, spec: Spec) -> _Value:
        """A tensor on memory of its own."""
        return _Value(spec, Storage(spec.bytes))

    # ---- forward ----

    def graph(self, module: GraphModule, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """Run a graph as its generated code does: a name is dropped after its last use. Results are held for the caller."""
        values: dict[fx.Node, Any] = {}
        given = iter(arguments)
        for node, last in self.schedule(module):
            if node.op == "placeholder":
                values[node] = next(given)
                self.hold(values[node])
            elif node.op == "output":
                given_back: Any = node.args[0]
                result: tuple[Any, ...] = fx.map_arg(given_back, values.__getitem__)
                self.hold(result)
                for name in last:
                    self.release(values.pop(name))
                return result
            else:
                values[node] = self.node(module, node, values)
            for name in last:
                self.release(values.pop(name))
        raise AssertionError("a graph ends with its output")

    def schedule(self, module: GraphModule) -> list[tuple[fx.Node, tuple[fx.Node, ...]]]:
        """Each node with the names whose last use it is."""
        if module not in self.schedules:
            seen: set[fx.Node] = set()
            found = []
            for node in reversed(module.graph.nodes):
                last = [name for name in (*node.all_input_nodes, node) if name not in seen and not (name is node and node.op == "output")]
                seen.update(last)
                found.append((node, tuple(dict.fromkeys(last))))
            self.schedules[module] = found[::-1]
        return self.schedules[module]

    def node(self, module: GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """One node; its result, held."""
        target: Any = module.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        if isinstance(target, (GraphModule, Recomputing)):
            return self.block(target, node.meta["repeat"], fx.map_arg(node.args, values.__getitem__))
        given = [values[name] for name in node.all_input_nodes]
        if isinstance(target, Prefetch):
            before: Any = fx.map_arg(node.kwargs.get("before", ()), values.__getitem__)
            return self.begin(target, fx.map_arg(node.args, values.__getitem__), tuple(before))
        if isinstance(early := given[-1] if given else None, _Early):
            return self.end(early, node)
        if given and isinstance(given[0], tuple):  # an item of a call with several results
            item = given[0][node.args[1]]  # type: ignore[index]
            self.hold(item)
            return item
        if target is torch.ops.aten.sym_size.int:
            return given[0].spec.shape[node.args[1]]
        if "local" not in node.meta and not any(isinstance(value, _Value) for value in given):  # arithmetic of sizes
            return target(*fx.map_arg(node.args, values.__getitem__))
        tensors: list[_Value] = []
        args, kwargs = _slotted((node.args, node.kwargs), values, tensors)
        function = target.target if isinstance(target, RandomCall) else target
        estimate = tuple(self.local(tensor, layout) for tensor, layout in node.meta.get("local", ()))
        if isinstance(target, HeldElements):
            split = at_sizes(target.layout, self.symbols).splits[0]
            estimate = (contiguous((local_size(split, target.mesh, target.coordinate),), torch.int64),)
        sizes = tuple(value for value in given if not isinstance(value, _Value))
        return self.call(Call(function, args, kwargs, estimate), (node, sizes), tuple(tensors), self.marked.get(node.name))

    def block(self, module: GraphModule | Recomputing, repeat: int, arguments: Sequence[Any]) -> Any:
        """One copy of a repeated block."""
        outside, self.seen = self.seen, []
        if isinstance(module, Recomputing) and self.optimizer is not None:
            self.marked = module.marked
        results = self.graph(module.body if isinstance(module, Recomputing) else module, arguments)
        for storage in self.made:
            self.ledger.forget(storage)
        self.marked, self.made = {}, []
        self.copies.append(Copy(repeat, tuple(self.seen)))
        self.seen = outside
        return results

    def call(
        self, call: Call, key: Any, operands: tuple[_Value, ...], marked: frozenset[int] | None = None, ends: frozenset[int] = frozenset()
    ) -> Any:
        """An operator or conversion: its results, held; `marked` ones are not kept, nor what else is kept of a call that has any.

        `ends` are results that end as gradients of parameters.
        """
        seen = self.observer.forward(call, key, tuple(value.spec for value in operands))
        storages = [*(value.storage for value in operands), *map(Storage, seen.new)]
        kept: list[Storage | Remade] = [storages[place].remade or storages[place] for place in seen.kept]
        if marked is not None:
            again = self.again(call, key, operands)
            again.results.update({place: Remade(again, storages[place].bytes) for place in range(len(operands), len(storages))})
            kept = [again.results.get(place, found) for place, found in zip(seen.kept, kept, strict=True)]
        for place, needed in zip(seen.kept, kept, strict=True):
            if place < len(operands):  # these are kept before the kernel runs
                self.ledger.refer(needed)
        final = {found[1] for number in ends if (found := seen.results[number])}
        self.ledger.look(seen.peak, sum(storages[place].bytes for place in final if place >= len(operands)))
        results: list[_Value | None] = []
        for found, same in zip(seen.results, seen.is_same, strict=True):
            results.append(None if found is None else operands[same] if same is not None else _Value(found[0], storages[found[1]]))
        self.hold(results)
        for place, needed in zip(seen.kept, kept, strict=True):
            if place >= len(operands):
                self.ledger.refer(needed)
        if marked is not None:
            picked = (seen.results[number] for number in sorted(marked))
            for place in {found[1]: None for found in picked if found is not None and found[1] in again.results}:
                self.ledger.promise(storages[place], again.results[place])
                self.made.append(storages[place])
            self.ledger.unrefer_call(again)
        if isinstance(key[0], fx.Node):
            here = tuple(None if value is None else value.storage for value in results)
            self.seen.append(Seen(key[0], tuple(storages[: len(operands)]), here, tuple(storages[place] for place in seen.kept)))
        made = tuple(value if same is None else None for value, same in zip(results, seen.is_same, strict=True))
        if any(value is not None and value.spec.requires_grad for value in made):
            self.tape.append(_Step(call, key, operands, made, tuple(kept)))
            self.leaves.update(value for value in set(operands) if value in self.leaves)
        return tuple(results) if seen.several else results[0]

    def begin(self, prefetch: Prefetch, given: Sequence[Any], before: tuple[_Early | None, ...]) -> _Early | None:
        """A conversion that begins early, if there is anything to begin; `before` are those of the block before."""
        operands = tuple(value for value in given if isinstance(value, _Value))
        rest = tuple(value for value in given if not isinstance(value, _Value))
        journey = Journey(prefetch.conversion, rest, tuple(value.spec for value in operands))  # type: ignore[arg-type]
        if not journey.is_needed:
            return None
        early = _Early(journey, operands, self.value(contiguous((), torch.float32, True)), before)
        self.begin_values(early)
        if early.wanted:
            self.tape.append(_Step(early, None, early.wanted, (early.token,)))
            self.leaves.update(early.wanted)
        return early

    def begin_values(self, early: _Early) -> None:
        """The exchange is under way."""
        plain = tuple(_Value(value.spec._replace(requires_grad=False), value.storage) for value in early.operands)
        early.values = self.part(early.journey, early.journey.begin, plain)

    def end_values(self, early: _Early) -> tuple[_Value, ...]:
        """The converted tensors, held; nothing else holds them any more."""
        found = self.part(early.journey, early.journey.end, early.values[: len(early.operands)])
        self.release(early.values)
        early.values = ()
        return found

    def end(self, early: _Early, node: fx.Node) -> Any:
        """The converted tensors as the block uses them, held."""
        found = self.end_values(early)
        wants = bool(early.wanted)
        results = tuple(_Value(value.spec._replace(requires_grad=wants), value.storage) for value in found)
        if wants:
            self.tape.append(_Step(early, None, (early.token,), results))
        conversion = early.journey.conversion
        if isinstance(conversion, Bucket):
            return results
        storage = results[0].storage
        self.seen.append(Seen(node, tuple(value.storage for value in early.operands), (storage,), ()))
        if node.name in self.marked and not storage.rests:
            again = self.again(Call(conversion, (Slot(0), *early.journey.rest), {}), early.journey, early.operands)
            again.results[0] = early.remade = Remade(again, storage.bytes)
            self.early[again.number] = early
            self.ledger.promise(storage, again.results[0])
            self.made.append(storage)
            self.ledger.unrefer_call(again)
        return results[0]

    def part(
        self, journey: Journey, function: Callable[..., Any], operands: tuple[_Value, ...], ends: frozenset[int] = frozenset()
    ) -> tuple[_Value, ...]:
        """What a part of a conversion gives, held. No autograd."""
        found: tuple[_Value, ...] = self.call(*_part(journey, function, len(operands)), operands, None, ends)
        return found

    def again(self, call: Call, key: Any, operands: tuple[_Value, ...]) -> Again:
        """The call as it may be made again, referred to."""
        self.calls += 1
        holds = dict.fromkeys(value.storage for value in operands)
        again = Again(self.calls, call, key, tuple(v.spec for v in operands), tuple(storage.remade or storage for storage in holds))
        self.ledger.refer_call(again)
        return again

    def make(self, wanted: Remade) -> None:
        """Make a tensor again: the calls that it rests on run in the order of the forward."""
        pending: dict[int, Again] = {}
        stack = [wanted]
        while stack:
            remade = stack.pop()
            if remade.storage is None and remade.again.number not in pending:
                pending[remade.again.number] = remade.again
                stack += [operand for operand in remade.again.operands if isinstance(operand, Remade)]
        for number in sorted(pending):
            again = pending[number]
            early = self.early.get(number)
            if early is not None and early.values:
                self.release(self.end_values(early))
            else:
                self.ledger.look(self.observer.forward(again.call, again.key, again.specs).peak)
            self.ledger.fill(again)

    def hold(self, value: Any) -> None:
        """Something more refers to a value, or to each of several."""
        for storage in _storages(value):
            self.ledger.change(storage, held=1)

    def release(self, value: Any) -> None:
        """The inverse of `hold`."""
        for storage in _storages(value):
            self.ledger.change(storage, held=-1)

    # ---- backward ----

    def backward(self, outputs: Sequence[_Value]) -> None:
        """Autograd's engine: the last call first; what a call kept is freed when it is done.

        A call that the loss does not depend on keeps what it keeps for as long as the caller holds the outputs.
        """
        differentiable = [value for value in outputs if value.spec.requires_grad]
        scalars = [value for value in differentiable if not value.spec.shape]
        pending: dict[_Value, _Value] = {}
        for value in scalars[:1] or dict.fromkeys(differentiable):
            seed = self.value(contiguous(value.spec.shape, value.spec.dtype))
            self.hold(seed)
            self.arrive(value, seed, pending, False)
        for step in reversed(self.tape):
            arrived = tuple(None if value is None else pending.pop(value, None) for value in step.results)
            self.leaves.subtract(value for value in set(step.operands) if value in self.leaves)
            if any(arrived):
                self.step_back(step, arrived, pending)

    def step_back(self, step: _Step, arrived: tuple[_Value | None, ...], pending: dict[_Value, _Value]) -> None:
        """The backward of one call: from the gradients of its results to those of its operands."""
        if isinstance(step.call, _Early):
            self.early_back(step.call, step, arrived, pending)
            return
        for kept in step.kept:
            if isinstance(kept, Remade):
                self.make(kept)
        specs = tuple(None if gradient is None else gradient.spec for gradient in arrived)
        seen = self.observer.backward(step.call, step.key, tuple(value.spec for value in step.operands), specs)
        given = [gradient for gradient in arrived if gradient is not None]
        storages = [*(gradient.storage for gradient in given), *map(Storage, seen.new)]
        last = [found[1] for value, found in zip(step.operands, seen.results, strict=True) if found and self.is_last(value, pending)]
        self.ledger.look(seen.peak, sum(storages[place].bytes for place in {*last}.intersection(seen.at_peak)))
        made: list[tuple[_Value, _Value]] = []
        for operand, found, same in zip(step.operands, seen.results, seen.is_same, strict=True):
            if found is not None:
                made.append((operand, given[same] if same is not None else _Value(found[0], storages[found[1]])))
        self.hold([gradient for _, gradient in made])
        self.ledger.unrefer(*step.kept)
        self.release(given)
        uses = Counter(gradient for _, gradient in made)
        for operand, gradient in made:
            self.arrive(operand, gradient, pending, uses[gradient] > 1)

    def early_back(self, early: _Early, step: _Step, arrived: tuple[_Value | None, ...], pending: dict[_Value, _Value]) -> None:
        """The gradients of converted parameters begin their way, or end it."""
        if step.results == (early.token,):
            ended = self.part(early.journey, early.journey.end_back, early.gradients[: len(early.gradients) // 2])
            self.release((arrived, early.gradients))
            early.gradients = ()
            for operand, gradient in zip(early.wanted, ended, strict=True):
                self.arrive(operand, gradient, pending, False)
            return
        given: list[_Value] = []
        for result, found in zip(step.results, arrived, strict=True):
            assert result is not None
            given.append(self.value(contiguous(result.spec.shape, result.spec.dtype)) if found is None else found)
            self.hold(given[-1] if found is None else None)  # zeros
        ends = self.ends(early, given, pending)
        early.gradients = self.part(early.journey, early.journey.begin_back, tuple(given), ends)
        self.release(given)
        for number in ends:
            self.ledger.change(early.gradients[number].storage, rests="gradients")
        for other in reversed(early.before):
            if other is not None and not other.values and other.remade and other.remade.references and not other.remade.storage:
                self.begin_values(other)
        pending[early.token] = self.value(contiguous((0,), torch.float32))
        self.hold(pending[early.token])

    def ends(self, early: _Early, given: Sequence[_Value], pending: Mapping[_Value, _Value]) -> frozenset[int]:
        """Which of the tensors that the exchanges bring are parameters' gradients at last, by number."""
        journey = early.journey
        begun = self.observer.forward(*_part(journey, journey.begin_back, len(given)), tuple(value.spec for value in given)).results
        received = tuple(found[0] for found in begun[: len(begun) // 2] if found)
        ended = self.observer.forward(*_part(journey, journey.end_back, len(received)), received).results
        alone = [self.leaves[value] == 1 and value not in pending for value in early.wanted]
        places = {found[1] for found, only in zip(ended, alone, strict=True) if found and only}
        return frozenset(place for place in places if place < len(received))

    def arrive(self, value: _Value, gradient: _Value, pending: dict[_Value, _Value], shared: bool) -> None:
        """A gradient of `value`, held: added to what came before, in memory of its own; that of a parameter is copied if it is not
        laid out like it, or if it is `shared` with another tensor."""
        before = pending.pop(value, None)
        if before is not None:
            gradient = self.replaced(before.spec if before.spec.is_dense else value.spec, before, gradient)
        if value in self.leaves and self.leaves[value] == 0:
            if before is None and (shared or not gradient.spec.is_laid_out_like(value.spec)):
                gradient = self.replaced(value.spec, gradient)
            self.ledger.change(gradient.storage, rests="gradients")
        pending[value] = gradient

    def is_last(self, value: _Value, pending: Mapping[_Value, _Value]) -> bool:
        """Whether the gradient that comes now is all that a parameter gets."""
        return value in self.leaves and self.leaves[value] == 0 and value not in pending

    def replaced(self, spec: Spec, *old: _Value) -> _Value:
        """A new tensor made of others, which are released."""
        new = self.value(spec)
        self.hold(new)
        self.ledger.look()
        self.release(old)
        return new

    def update(self) -> None:
        """The optimizer's step, parameter by parameter."""
        assert self.optimizer is not None
        needs = [self.optimizer.temporary_bytes(value.spec.shape, value.spec.dtype.itemsize) for value in self.leaves]
        self.ledger.look(max(needs, default=0))


def _part(journey: Journey, function: Callable[..., Any], operands: int) -> tuple[Call, Any]:
    """A part of a conversion as a call, and its key."""
    return Call(function, tuple(Slot(place) for place in range(operands)), {}), (journey, function.__name__)


def _slotted(tree: Any, values: dict[fx.Node, Any], tensors: list[_Value]) -> Any:
    """Arguments with a `Slot` for every tensor; the tensors are appended to `tensors`."""
    if isinstance(tree, fx.Node):
        return _slotted(values[tree], values, tensors)
    if isinstance(tree, _Value):
        tensors.append(tree)
        return Slot(len(tensors) - 1)
    if isinstance(tree, (tuple, list)):  # fx has lists and tuples of its own
        return (list if isinstance(tree, list) else tuple)(_slotted(item, values, tensors) for item in tree)
    if isinstance(tree, dict):
        return {key: _slotted(item, values, tensors) for key, item in tree.items()}
    return tree


def _storages(value: Any) -> list[Storage]:
    if isinstance(value, _Value):
        return [value.storage]
    if isinstance(value, (tuple, list)):
        return [storage for item in value for storage in _storages(item)]
    return []

