"""Trace each distinct block once: calls of the other copies become one operator each, which is replaced by the block's nodes afterwards.

The model's own Python runs at full depth. Only the forwards of modules of which there are several alike are cut short, and only where
nothing can tell the copies apart:

- The first call of a block is traced, and watched: what it reads of its modules' attributes, which global variables its functions name.
- The next copy that agrees in all of that is traced too; its nodes must be those of the first, with the parameters renamed.
- From then on, copies that agree give one operator with the outputs of the first.

Agree means: the same class, parameters and buffers of the same types, equal values of every attribute that the first has read, equal
global variables, the same types and arguments of the call. Blocks that change anything (attributes, buffers, arguments, random state
of Python, memory), call what cannot be copied or return views of their inputs are traced every time.
"""

from __future__ import annotations

import functools
import operator
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import fx, nn

from autotp import _torch
from autotp.autograd_functions import FunctionCalls
from autotp.expand import Cut, mark_body, split_at
from autotp.functional import is_write, memory, site_of, written
from autotp.trace_state import Reads, Unknown, attributes, described, held_tensors, tensor_type, watched_reads

LEAST = 3
"""Blocks of which there are fewer are traced as they are: two are always traced."""

TRIALS = 6
"""How many different blocks of one structure are watched until the structure is given up."""

PROXY_SIDE = frozenset({torch._C._set_grad_enabled, torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast})
"""What a graph under construction holds besides operators."""


class Peculiar(Exception):
    """Something by which a block cannot be repeated."""


@dataclass
class Body:
    """The traced nodes of one call.

    Attributes:
        name: the module's path.
        operands: the nodes of the tensors among the call's arguments.
        steps: the nodes that give tensors, in order.
        owned: the nodes of the module's parameters and buffers, in order.
        made: the tensors among the outputs that are new, each once; news: their nodes.
        results: per leaf of the output ("made" or "given", number of the tensor) or ("plain", value); spec: its structure.
    """

    name: str
    operands: list[fx.Node]
    steps: list[fx.Node]
    owned: list[fx.Node | None]
    made: list[torch.Tensor]
    news: list[fx.Node | None]
    results: list[tuple[str, Any]]
    spec: Any


@dataclass
class Block:
    """A block that was traced in full, and what its trace depends on.

    Attributes:
        attributes: what its modules held; read: the attributes that the trace has read.
        signature: of the call; roots: the global variables that it named, as (mapping, key), and their description.
        body: its nodes; None for a block that cannot be repeated.
        operator: what stands for a copy, once a second copy has given the same nodes.
    """

    attributes: Mapping[tuple[str, str], Any]
    read: frozenset[tuple[str, str]]
    signature: Any
    roots: list[tuple[Any, str]]
    globals: Any
    body: Body | None
    operator: Any = None

    def fits(self, held: Mapping[tuple[str, str], Any], signature: Any) -> bool:
        """Whether a call of a module that holds these attributes cannot be told from the one that was traced."""
        if self.signature != signature:
            return False
        if any(held.get(key, ...) != self.attributes.get(key, ...) for key in self.read):
            return False
        return bool(_globals(self.roots) == self.globals)


@dataclass
class Candidate:
    """A module of which there are several alike."""

    name: str
    module: nn.Module
    kind: int


@dataclass
class Repeats:
    """The calls that one export cuts short.

    Attributes:
        functions: the custom autograd Functions among the operators.
        library: where operators are defined that stand for calls.
        whole: cut nothing short.
        confirmed: the bodies that are repeated; operators: what stands for their copies.
        calls: in order, the number of the body that each repeats, and the path of the module that was called.
        blocks: kind of module → what was watched; busy: while that is done.
    """

    functions: FunctionCalls
    library: torch.library.Library
    whole: bool = False
    confirmed: list[Body] = field(default_factory=list)
    operators: list[Any] = field(default_factory=list)
    calls: list[tuple[int, str]] = field(default_factory=list)
    blocks: dict[int, list[Block]] = field(default_factory=lambda: defaultdict(list))
    busy: bool = False

    @property
    def cut(self) -> Cut:
        """What was cut short."""
        return Cut([body.name for body in self.confirmed], self.operators, self.calls)

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Inside, calls of the model's repeated modules are cut short while it is exported."""
        found = {} if self.whole else {id(vars(item.module)): item for item in candidates(model)}
        if not found or _torch.global_hooks():
            yield
            return
        with ExitStack() as stack:
            for kind in {type(item.module) for item in found.values()}:
                stack.enter_context(self._replaced(kind, found))
            yield

    @contextmanager
    def _replaced(self, kind: type, found: Mapping[int, Candidate]) -> Iterator[None]:
        """Inside, the class's forward passes here first."""
        original, own = kind.forward, "forward" in vars(kind)  # type: ignore[attr-defined]

        @functools.wraps(original)
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            candidate = None if self.busy else found.get(id(vars(module)))
            run = functools.partial(original, module)
            return run(*args, **kwargs) if candidate is None else self._called(candidate, run, args, kwargs)

        kind.forward = forward  # type: ignore[attr-defined]
        try:
            yield
        finally:
            if own:
                kind.forward = original  # type: ignore[attr-defined]
            else:
                del kind.forward  # type: ignore[attr-defined]

    def _called(self, candidate: Candidate, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One call of a candidate: watched, compared, or cut short."""
        known = self.blocks[candidate.kind]
        if len(known) >= TRIALS and not any(block.body for block in known):
            return run(*args, **kwargs)
        try:
            with _torch.unwatched():
                call = _Call(candidate, args, kwargs)
        except (Peculiar, Unknown, LookupError):
            return run(*args, **kwargs)
        self.busy = True
        try:
            block = next((block for block in known if block.body and block.fits(call.held, call.signature)), None)
            if block is None and sum(block.operator is None for block in known) >= TRIALS:
                return run(*args, **kwargs)
            if block is None:
                return self._watched(call, run)
            if block.operator is None:
                return self._compared(call, run, block)
            return self._repeated(call, block)
        finally:
            self.busy = False

    def _watched(self, call: _Call, run: Callable[..., Any]) -> Any:
        """Trace the call and find out what it depends on."""
        with watched_reads() as reads:
            result = call.run(run)
        inside = {id(vars(part)): name for name, part in _torch.plain_modules(call.candidate.module)}
        read = {(inside[holder], name) for holder, name in reads.attributes if holder in inside}
        roots = reads.roots(set(inside))
        body, found = None, None
        try:
            with _torch.unwatched():
                body, found = self._body(call, result, reads), _globals(roots)
        except (Peculiar, Unknown):
            body = None
        read |= {key for key in call.held if key[1] in ("class", "_parameters", "_buffers", "_modules")}
        self.blocks[call.candidate.kind].append(Block(call.held, frozenset(read), call.signature, roots, found, body))
        return result

    def _compared(self, call: _Call, run: Callable[..., Any], block: Block) -> Any:
        """Trace a second copy, which must give the nodes of the first."""
        result = call.run(run)
        first, block.body = block.body, None
        try:
            with _torch.unwatched():
                body = self._body(call, result, None)
            if first is not None and _globals(block.roots) == block.globals and same_body(first, body, self.functions):
                block.body, block.operator = first, self._operator(first)
                self.confirmed.append(first)
                self.operators.append(block.operator)
                mark_body(len(self.confirmed) - 1, first.operands, first.steps, first.news)
        except (Peculiar, Unknown):
            pass
        return result

    def _body(self, call: _Call, result: Any, reads: Reads | None) -> Body:
        """The nodes of a call that has just been traced.

        Raises:
            Peculiar, Unknown: the call cannot be repeated.
        """
        if reads is not None and reads.opened:
            raise Peculiar
        call.check_unchanged()
        steps = [node for node in call.new_nodes() if _is_step(node)]
        call.check_writes(steps)
        leaves, spec = _torch.tree_flatten(result)
        inside, given = set(steps), {id(tensor): number for number, tensor in enumerate(call.tensors)}
        keys = {_torch.storage_key(tensor) for tensor in [*call.tensors, *call.state()]}
        results: list[tuple[str, Any]] = []
        made: dict[int, tuple[int, torch.Tensor]] = {}
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                if not isinstance(leaf, (bool, int, float, str, type(None), torch.SymInt)):
                    raise Peculiar
                results.append(("plain", leaf))
            elif id(leaf) in given:
                results.append(("given", given[id(leaf)]))
            elif call.recording.node(leaf) not in inside or _torch.storage_key(leaf) in keys or type(leaf) is not type(call.tensors[0]):
                raise Peculiar
            else:
                results.append(("made", made.setdefault(id(leaf), (len(made), leaf))[0]))
        new = [leaf for _, leaf in made.values()]
        if not new or len({_torch.storage_key(leaf) for leaf in new}) < len(new):
            raise Peculiar
        nodes = [call.recording.node(leaf) for leaf in new]
        return Body(call.candidate.name, call.operands, steps, call.nodes_held, new, nodes, results, spec)

    def _operator(self, body: Body) -> Any:
        """The operator that stands for copies of a block.

        Raises:
            Peculiar: of its floating results some require gradients and some do not.
        """
        grown = {leaf.requires_grad for leaf in body.made if leaf.is_floating_point() or leaf.is_complex()}
        if len(grown) > 1:
            raise Peculiar
        return _torch.define_operator(self.library, len(self.confirmed), body.made, differentiable=True in grown)

    def _repeated(self, call: _Call, block: Block) -> Any:
        """One operator in place of the call's."""
        body = block.body
        assert body is not None
        with _torch.unwatched():
            anchor = [tensor for tensor in call.state() if tensor.requires_grad][:1]  # by which the results require gradients
        made = block.operator([*call.tensors, *anchor], [len(self.calls)])
        self.calls.append((self.operators.index(block.operator), call.candidate.name))
        found = {"made": made, "given": call.tensors}
        leaves = [value if kind == "plain" else found[kind][value] for kind, value in body.results]
        return _torch.tree_unflatten(leaves, body.spec)


def candidates(model: nn.Module) -> list[Candidate]:
    """The outermost modules of which there are at least `LEAST` with the same classes, parameters and buffers inside.

    They run their class's own forward without hooks, and share no parameter, buffer or module with the rest.
    """
    numbers: dict[Any, int] = {}
    kinds: dict[int, int] = {}
    lonely: dict[int, bool] = {}
    owners = Counter(id(tensor) for tensor in _all_tensors(model))
    uses = Counter(id(part) for _, part in _torch.plain_modules(model))

    def number(module: nn.Module) -> int:
        held = vars(module)
        children = tuple((label, None if child is None else number(child)) for label, child in held["_modules"].items())
        tensors = [(label, tensor) for key in ("_parameters", "_buffers") for label, tensor in held[key].items()]
        key = type(module), children, tuple((label, None if tensor is None else (tensor.shape, tensor.dtype)) for label, tensor in tensors)
        kinds[id(module)] = numbers.setdefault(key, len(numbers))
        lonely[id(module)] = (
            "forward" not in held
            and not _torch.hooks_of(module)
            and uses[id(module)] == 1
            and all(tensor is None or owners[id(tensor)] == 1 for _, tensor in tensors)
            and all(child is None or lonely[id(child)] for child in held["_modules"].values())
        )
        return kinds[id(module)]

    number(model)

    def fitting(module: nn.Module) -> bool:
        runs = type(module).forward is not nn.Module.forward and bool(vars(module)["_modules"])
        return runs and lonely[id(module)] and not isinstance(module, (nn.ModuleList, nn.ModuleDict))

    counts: Counter[int] = Counter()

    def outermost(module: nn.Module, name: str, chosen: Callable[[nn.Module], bool]) -> Iterator[tuple[str, nn.Module]]:
        for label, child in vars(module)["_modules"].items():
            if child is not None:
                path = f"{name}.{label}".lstrip(".")
                if chosen(child):
                    yield path, child
                else:
                    yield from outermost(child, path, chosen)

    counts.update(kinds[id(part)] for _, part in _torch.plain_modules(model) if fitting(part))
    several = list(outermost(model, "", lambda part: fitting(part) and counts[kinds[id(part)]] >= LEAST))
    outside = Counter(kinds[id(part)] for _, part in several)
    return [Candidate(name, part, kinds[id(part)]) for name, part in several if outside[kinds[id(part)]] >= LEAST]


def _all_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every parameter and buffer, once for each place that it has."""
    for _, part in _torch.plain_modules(model):
        for key in ("_parameters", "_buffers"):
            yield from (tensor for tensor in vars(part)[key].values() if tensor is not None)


class _Call:
    """One call of a candidate while an export is under way."""

    def __init__(self, candidate: Candidate, args: Any, kwargs: Any) -> None:
        """Describe the call before it runs.

        Raises:
            Unknown, Peculiar, LookupError: it cannot be described; nothing is being traced, or not as in training.
        """
        self.candidate = candidate
        self.given = args, kwargs
        self.recording = _torch.Recording()
        self.surroundings = _torch.surroundings()
        if not self.surroundings[0] or self.surroundings[1]:
            raise Peculiar  # no gradients, or autocast
        self.held = attributes(candidate.module)
        leaves, _ = _torch.tree_flatten(self.given)
        self.tensors = list({id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}.values())
        nodes = [self.recording.node(tensor) for tensor in self.tensors]
        if not nodes or None in nodes:
            raise Peculiar
        self.operands: list[fx.Node] = [node for node in nodes if node is not None]
        if len(set(self.operands)) < len(self.operands) or set(self.operands) & set(self.owned()):
            raise Peculiar
        self.signature = self._signature(), self.surroundings

    def _signature(self) -> Any:
        """What a call can tell about its arguments: their structure, types, which of them are or share the same, other values."""
        leaves, spec = _torch.tree_flatten(self.given)
        numbers = {id(tensor): number for number, tensor in enumerate(self.tensors)}
        memory: dict[int, int] = {}
        seen: dict[int, tuple[int, Any]] = {}
        found: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                found.append((numbers[id(leaf)], tensor_type(leaf), memory.setdefault(_torch.storage_key(leaf), len(memory))))
            else:
                found.append(described(leaf, seen))
        return found, spec

    def state(self) -> list[torch.Tensor]:
        """The module's parameters and buffers."""
        return list(_all_tensors(self.candidate.module))

    def owned(self) -> list[fx.Node | None]:
        """The nodes of the module's parameters and buffers."""
        return [self.recording.node(tensor) for tensor in self.state()]

    def run(self, run: Callable[..., Any]) -> Any:
        """Trace it."""
        self.start = self.recording.last()
        self.random = _random_state()
        self.tensors_held, self.nodes_held = held_tensors(self.candidate.module), self.owned()
        args, kwargs = self.given
        return run(*args, **kwargs)

    def new_nodes(self) -> list[fx.Node]:
        """What it appended to the graph."""
        nodes, node = [], self.start.next
        while node.op != "root":
            nodes.append(node)
            node = node.next
        return nodes

    def check_writes(self, steps: Sequence[fx.Node]) -> None:
        """Raises Peculiar if a step writes to memory that is neither made by the call nor a buffer of the module."""
        buffers = {_torch.storage_key(tensor) for tensor in self.state() if not isinstance(tensor, nn.Parameter)}
        inside = set(steps)
        outside = {key for node in steps for item in node.all_input_nodes if item not in inside for key in memory(item)} - buffers
        if any(key in outside for node in steps if is_write(node) for item in written(node) for key in memory(item)):
            raise Peculiar

    def check_unchanged(self) -> None:
        """Raises Peculiar if the call has changed what it was given, its module's attributes, or how PyTorch works."""
        same = (
            self._signature() == self.signature[0]
            and attributes(self.candidate.module) == self.held
            and held_tensors(self.candidate.module) == self.tensors_held
            and _torch.surroundings() == self.surroundings
            and _random_state() == self.random
        )
        if not same:
            raise Peculiar


def _random_state() -> Any:
    """The state of Python's and numpy's global generators."""
    kind, words, *rest = numpy.random.get_state()
    return random.getstate(), kind, words.tobytes(), rest  # type: ignore[attr-defined]


def _globals(roots: Sequence[tuple[Any, str]]) -> Any:
    """A description of the present values of global variables."""
    seen: dict[int, tuple[int, Any]] = {}
    return [described(holder[name], seen) if name in holder else ... for holder, name in roots]


def is_number(node: fx.Node) -> bool:
    """Whether a node gives a size or another number, or nothing: the same for all copies of a block."""
    value = node.meta.get("val")
    return not isinstance(value, (torch.Tensor, tuple, list))


def _is_step(node: fx.Node) -> bool:
    """Whether a node of a body gives tensors.

    Raises:
        Peculiar: a copy of it would not do.
    """
    target: Any = node.target
    if node.op != "call_function":
        raise Peculiar
    if is_number(node):
        tensors = any(not is_number(operand) for operand in node.all_input_nodes)
        if target in PROXY_SIDE or not tensors:
            return False
        if isinstance(target, torch._ops.OpOverload) and (target._schema.name.startswith("aten::sym_") or not target._schema.returns):
            return False
        raise Peculiar  # a number that depends on values
    if target is not operator.getitem and not isinstance(target, torch._ops.OpOverload):
        raise Peculiar
    return True


# ---- are two bodies the same? ---------------------------------------------------------------------------------------


def same_body(one: Body, other: Body, functions: FunctionCalls) -> bool:
    """Whether two traced calls have the same nodes, each with its own operands, parameters and buffers."""
    if (len(one.steps), one.results, one.spec) != (len(other.steps), other.results, other.spec):
        return False
    if list(map(tensor_type, one.made)) != list(map(tensor_type, other.made)) or len(one.owned) != len(other.owned):
        return False
    lists: list[tuple[Sequence[Any], Sequence[Any]]] = [(one.operands, other.operands), (one.owned, other.owned), (one.steps, other.steps)]
    counterpart = {first: second for ours, theirs in lists for first, second in zip(ours, theirs, strict=True)}
    if [counterpart.get(node) for node in one.news] != other.news:
        return False
    return all(
        _target(first, functions) == _target(second, functions)
        and _same_arguments((first.args, first.kwargs), (second.args, second.kwargs), counterpart)
        and _value(first) == _value(second)
        and _place(first, one.name) == _place(second, other.name)
        for first, second in zip(one.steps, other.steps, strict=True)
    )


def _target(node: fx.Node, functions: FunctionCalls) -> Any:
    return functions.calls.get(node.target, node.target)


def _same_arguments(one: Any, other: Any, counterpart: Mapping[Any, fx.Node | None]) -> bool:
    if isinstance(one, fx.Node):
        if not isinstance(other, fx.Node):
            return False
        if is_number(one):
            return is_number(other) and bool(_torch.expression(one.meta.get("val")) == _torch.expression(other.meta.get("val")))
        return counterpart.get(one, one) is other
    if type(one) is not type(other):
        return False
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(_same_arguments(a, b, counterpart) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same_arguments(one[key], other[key], counterpart) for key in one)
    if isinstance(one, slice):
        return _same_arguments((one.start, one.stop, one.step), (other.start, other.stop, other.step), counterpart)
    return repr(one) == repr(other) if isinstance(one, float) else bool(one == other)


def _value(node: fx.Node) -> Any:
    value = node.meta["val"]
    several = value if isinstance(value, (tuple, list)) else (value,)
    return type(value), [tensor_type(item)[1:7] if isinstance(item, torch.Tensor) else item for item in several]


def _place(node: fx.Node, name: str) -> Any:
    """Where in the block's code and modules a node comes from."""
    path, _ = site_of(node)
    inner = path.removeprefix("_export_root").lstrip(".")
    text = node.meta.get("stack_trace") or ""
    return inner.removeprefix(name) if f"{inner}.".startswith(f"{name}.") else f"/{inner}", text[split_at(text) :]
