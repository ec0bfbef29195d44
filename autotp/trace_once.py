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
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from autotp import _torch
from autotp.autograd_functions import FunctionCalls
from autotp.expand import Cut, Inexact, mark_body
from autotp.trace_call import Body, Call, Peculiar, all_tensors, is_step, same_body
from autotp.trace_state import Reads, Unknown, described, tensor_type, watched_reads

LEAST = 3
"""Blocks of which there are fewer are traced as they are: two are always traced."""

TRIALS = 6
"""How many different blocks of one structure are watched until the structure is given up."""


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
        try:
            return bool(_globals(self.roots) == self.globals)
        except Unknown:
            return False


@dataclass(frozen=True)
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
                call = Call(candidate.module, args, kwargs)
        except (Peculiar, Unknown, LookupError):
            return run(*args, **kwargs)
        self.busy = True
        try:
            block = next((block for block in known if block.body and block.fits(call.held, call.signature)), None)
            if block is None and sum(block.operator is None for block in known) >= TRIALS:
                return run(*args, **kwargs)
            if block is None:
                return self._watched(candidate, call, run)
            if block.operator is None:
                return self._compared(candidate, call, run, block)
            return self._repeated(candidate, call, block)
        finally:
            self.busy = False

    def _watched(self, candidate: Candidate, call: Call, run: Callable[..., Any]) -> Any:
        """Trace the call and find out what it depends on."""
        with watched_reads() as reads:
            result = call.run(run)
        inside = {id(vars(part)): name for name, part in _torch.plain_modules(candidate.module)}
        read = {(inside[holder], name) for holder, name in reads.attributes if holder in inside}
        roots = reads.roots(set(inside))
        body, found = None, None
        try:
            with _torch.unwatched():
                body, found = self._body(candidate, call, result, reads), _globals(roots)
        except (Peculiar, Unknown):
            body = None
        read |= {key for key in call.held if key[1] in ("class", "_parameters", "_buffers", "_modules")}
        self.blocks[candidate.kind].append(Block(call.held, frozenset(read), call.signature, roots, found, body))
        return result

    def _compared(self, candidate: Candidate, call: Call, run: Callable[..., Any], block: Block) -> Any:
        """Trace a second copy, which must give the nodes of the first."""
        result = call.run(run)
        first, block.body = block.body, None
        try:
            with _torch.unwatched():
                body = self._body(candidate, call, result, None)
            if first is not None and _globals(block.roots) == block.globals and same_body(first, body, self.functions):
                block.body, block.operator = first, self._operator(first)
                self.confirmed.append(first)
                self.operators.append(block.operator)
                mark_body(len(self.confirmed) - 1, first.operands, first.steps, first.news)
        except (Peculiar, Unknown):
            pass
        return result

    def _body(self, candidate: Candidate, call: Call, result: Any, reads: Reads | None) -> Body:
        """The nodes of a call that has just been traced.

        Raises:
            Peculiar, Unknown: the call cannot be repeated.
        """
        if reads is not None and reads.opened:
            raise Peculiar
        call.check_unchanged()
        steps = [node for node in call.new_nodes() if is_step(node)]
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
            elif call.recording.node(leaf) not in inside or _torch.storage_key(leaf) in keys or leaf.storage_offset() != 0:
                raise Peculiar
            else:
                results.append(("made", made.setdefault(id(leaf), (len(made), leaf))[0]))
        new = [leaf for _, leaf in made.values()]
        if not new or len({_torch.storage_key(leaf) for leaf in new}) < len(new):
            raise Peculiar
        nodes = [call.recording.node(leaf) for leaf in new]
        return Body(candidate.name, call.operands, steps, call.nodes_held, new, nodes, results, spec)

    def _operator(self, body: Body) -> Any:
        """The operator that stands for copies of a block.

        Raises:
            Peculiar: of its floating results some require gradients and some do not.
        """
        grown = {leaf.requires_grad for leaf in body.made if leaf.is_floating_point() or leaf.is_complex()}
        if len(grown) > 1:
            raise Peculiar
        return _torch.define_operator(self.library, len(self.confirmed), body.made, differentiable=True in grown)

    def _repeated(self, candidate: Candidate, call: Call, block: Block) -> Any:
        """One operator in place of the call's.

        Raises:
            Inexact: its results are not like those of the block.
        """
        body = block.body
        assert body is not None
        with _torch.unwatched():
            anchor = [tensor for tensor in call.state() if tensor.requires_grad][:1]  # by which the results require gradients
        made = block.operator([*call.tensors, *anchor], [len(self.calls)])
        self.calls.append((self.operators.index(block.operator), candidate.name))
        with _torch.unwatched():
            if list(map(tensor_type, made)) != list(map(tensor_type, body.made)):
                raise Inexact
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
    owners = Counter(id(tensor) for tensor in all_tensors(model))
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


def _globals(roots: Sequence[tuple[Any, str]]) -> Any:
    """A description of the present values of global variables."""
    seen: dict[int, tuple[int, Any]] = {}
    return [described(holder[name], seen) if name in holder else ... for holder, name in roots]
