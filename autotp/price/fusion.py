"""Which kernels the operators of a program become, and what each of them reads and writes: eager, and compiled.

Eager, every operator is a kernel (or several) of its own, which reads its operands and writes its results; views are free unless
they must copy. Compiled, as by `torch.compile`, chains are one kernel:

- pointwise operators with as many elements, and smaller ones that they alone need;
- a reduction over the last dims with the pointwise operators before it and those after it, on rows of at most `LONGEST_ROW`
  elements, which stay in cache while the kernel passes over them again. A reduction over other dims ends its chain;
- views and the copies of reshapes, which become index arithmetic.

A tensor inside a chain, whose consumers all belong to the chain, is neither written nor read. In backward the chain is again one
kernel: it reads the gradients of what the chain wrote and what the chain keeps, computes anew what stayed inside from what the
chain read, and writes the gradients of what it read. Matrix products, attention, lookups and scatters are never part of a chain.

Chains do not know layouts. Where a plan converts a tensor inside a chain by a collective, the chain is broken there: the tensor is
written before and read after it, which `ConversionPrices.broken_seconds` adds, so that the parts never cost less than they must.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod

from autotp.in_place import writes_in_place
from autotp.price.memory import saved
from autotp.price.storage import Storage, is_pointwise, is_view, name_of, storage_of
from autotp.program import Node, Program, Ref

LONGEST_ROW = 1 << 18
"""Elements of a row beyond which a reduction and what follows it read their operand again from memory."""

REDUCTIONS = frozenset(
    "aten.sum aten.nansum aten.mean aten.amax aten.amin aten.max aten.min aten.aminmax aten.argmax aten.argmin aten.var aten.std "
    "aten.var_mean aten.std_mean aten.logsumexp aten.any aten.all aten.prod aten.linalg_vector_norm aten.count_nonzero aten.softmax "
    "aten._softmax aten.log_softmax aten._log_softmax aten._safe_softmax aten.layer_norm aten.rms_norm aten.native_layer_norm "
    "aten._fused_rms_norm aten.group_norm autotp.losses.row_maximum autotp.losses.sum_exp autotp.statistics.variance".split()
)
"""Operators that combine elements of their first operand, without the overload's name."""

COPIERS = frozenset("aten.cat aten.stack aten.constant_pad_nd autotp.losses.log_of_sum autotp.losses.kept_rows".split()) | {
    "autotp.losses.rows_of_loss",
    "autotp.statistics.normalize",
}
"""Operators that a compiler writes as pointwise kernels although they are not one pointwise operator in PyTorch."""


SUMS = frozenset(("aten.add", "aten.sub", "aten.rsub", "aten.detach", "aten.complex"))
"""Operators that hand their gradient on as it is."""


FUSIBLE = REDUCTIONS | COPIERS


@dataclass(frozen=True)
class Access:
    """How a node uses memory.

    Attributes:
        fused: the node belongs to a compiled chain (of one operator at least).
        kernel: a forward kernel starts here: every operator in eager, the first of a chain; False for views that copy nothing.
        gradient_kernel: so in backward.
        reads: per operand, the share of its elements that this node reads from memory in forward.
        rereads: per operand, the share that it reads again in backward, in a chain.
        gives: per operand, whether the gradient is written by this node.
        adds: per operand, whether a consumer before this one gives it a gradient too, so that the two must be added.
        copies: per operand, whether it must be copied first, because of its strides.
        stretched: per operand, whether it has fewer elements than the first result.
        writes: per output, whether it reaches memory; not for what is written into the first operand.
    """

    fused: bool
    kernel: bool
    gradient_kernel: bool
    reads: tuple[float, ...]
    rereads: tuple[float, ...]
    gives: tuple[bool, ...]
    adds: tuple[bool, ...]
    copies: tuple[bool, ...]
    stretched: tuple[bool, ...]
    writes: tuple[bool, ...]


def accesses(program: Program, compiled: bool = False) -> tuple[Access, ...]:
    """How every node of the program uses memory, by its index."""
    storage = storage_of(program)
    chains = _Chains(program, storage) if compiled else None
    adds = _added_gradients(program)
    found = []
    for node in program.nodes:
        count, view = len(node.inputs), is_view(node)
        copies = tuple((node.index, place) in storage.copies for place in range(count))
        reads = tuple(storage.share(program, ref) for ref in node.inputs)
        access = Access(
            fused=False,
            kernel=node.kind == "op" and (not view or any(copies)),
            gradient_kernel=node.kind == "op",
            reads=reads,
            rereads=reads,
            gives=(True,) * count,
            adds=tuple((node.index, place) in adds for place in range(count)),
            copies=copies,
            stretched=tuple(program.type_of(ref).numel < node.outputs[0].numel for ref in node.inputs),
            writes=(True,) * len(node.outputs),
        )
        found.append(access if chains is None or node.kind != "op" else chains.access(node, access))
    for index in writes_in_place(program):
        found[index] = replace(found[index], reads=(0.0, *found[index].reads[1:]), writes=(False,))
    return tuple(found)


def _added_gradients(program: Program) -> set[tuple[int, int]]:
    """(node, operand) of every consumer that adds its gradient to that of an earlier one."""
    found = set()
    for ref, users in program.users.items():
        if program.type_of(ref).requires_grad:
            giving = [user for user in users if _trained(program.nodes[user[0]])]
            found.update(giving[1:])
    return found


def _trained(node: Node) -> bool:
    return any(output.requires_grad for output in node.outputs)


@dataclass
class _Chain:
    """The operators of one kernel: `full` elements each, or `rows` after a reduction; `closed` where no row stays in the kernel."""

    level: int
    full: int
    rows: int | None = None
    members: list[int] = field(default_factory=list)


class _Chains:
    """The chains of a program.

    Every node has a level: that of its operands, one more where an edge leaves a chain. Members of a chain have one level, so
    that nothing outside can depend on a member and be needed by another.
    """

    def __init__(self, program: Program, storage: Storage) -> None:
        self.program, self.storage = program, storage
        self.root: dict[Ref, Ref] = {}
        self.chain: dict[int, _Chain] = {}
        self.closed: set[int] = set()
        level: dict[int, int] = {}
        for node in program.nodes:
            if node.kind == "op" and is_view(node):
                self.root |= {Ref(node.index, output): self.root_of(node.inputs[0]) for output in range(len(node.outputs))}
                continue
            before = list(dict.fromkeys(self.root_of(ref).node for ref in node.inputs))
            if not self._fusible(node):
                level[node.index] = max((level[owner] for owner in before), default=0)
                continue
            full, rows = self._domain(node)
            joins, joined_rows = set(), rows
            for owner in before:
                if owner in self.chain and self._joins(owner, node, full, joined_rows):
                    joins.add(owner)
                    joined_rows = self.chain[owner].rows or joined_rows
            here = level[node.index] = max((level[owner] + (owner not in joins) for owner in before), default=0)
            chain = _Chain(here, full, rows)
            for other in {id(c): c for owner in joins if (c := self.chain[owner]).level == here}.values():
                chain.full, chain.rows = max(chain.full, other.full), chain.rows or other.rows
                chain.members += other.members
            chain.members.append(node.index)
            for member in chain.members:
                self.chain[member] = chain
        self._leaves = self._leaving()
        self._first = self._first_uses()

    def root_of(self, ref: Ref) -> Ref:
        """The tensor that a view, or a view of a view, shows."""
        return self.root.get(ref, ref)

    def _fusible(self, node: Node) -> bool:
        return is_pointwise(node) or (node.kind == "op" and name_of(node.target) in FUSIBLE)

    def _domain(self, node: Node) -> tuple[int, int | None]:
        """Elements of the largest tensor, and of the result of a reduction."""
        if is_pointwise(node) or name_of(node.target) not in REDUCTIONS:
            return max(output.numel for output in node.outputs), None
        whole, out = self.program.type_of(node.inputs[0]), node.outputs[0]
        if out.numel == whole.numel:  # a norm or a softmax: rows are its last dims, or those that its arguments name
            dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
            last = isinstance(dims, (list, tuple)) or dims in (-1, len(whole.hint) - 1)
            if not last or name_of(node.target) == "aten.group_norm":
                self.closed.add(node.index)
            length = prod(whole.hint[-len(dims) :]) if isinstance(dims, (list, tuple)) else whole.hint[-1] if whole.hint else 1
            return whole.numel, whole.numel // max(length, 1)
        kept = out.hint if len(out.hint) == len(whole.hint) else (*out.hint, *[1] * (len(whole.hint) - len(out.hint)))
        leading = next((dim for dim, size in enumerate(kept) if size != whole.hint[dim]), len(kept))
        if any(size != 1 for size in kept[leading:]):
            self.closed.add(node.index)
        return whole.numel, out.numel

    def _joins(self, owner: int, node: Node, full: int, rows: int | None) -> bool:
        """Whether a node can be part of its operand's kernel."""
        chain = self.chain[owner]
        if owner in self.closed:
            return False
        if chain.rows is None:
            return full >= chain.full
        short = chain.full <= LONGEST_ROW * chain.rows
        if rows is not None and rows != chain.rows:
            return False
        return full == chain.rows or (short and full == chain.full)

    def _leaving(self) -> set[Ref]:
        """Results that reach memory: used outside of their chain, or given to the user."""
        leaving = {self.root_of(value) for value in self.program.outputs if isinstance(value, Ref)}
        leaving |= {self.root_of(ref) for _, ref in self.program.updates}
        for ref, users in self.program.users.items():
            root = self.root_of(ref)
            for user, _ in users:
                if not is_view(self.program.nodes[user]) and self.chain.get(user) is not self.chain.get(root.node):
                    leaving.add(root)
        return leaving

    def _first_uses(self) -> dict[tuple[int, Ref], tuple[int, int, bool]]:
        """(chain, tensor from outside) → the operand that pays for it, as (node, place), and whether backward needs it."""
        wanted: dict[tuple[int, Ref], list[tuple[int, int]]] = {}
        anew: set[int] = set()
        kept: set[tuple[int, Ref]] = set()
        for index, chain in self.chain.items():
            node = self.program.nodes[index]
            operands, outputs = saved(node) if _trained(node) and name_of(node.target) != "aten.dropout" else ((), ())
            anew |= {id(chain)} if any(Ref(index, output) not in self._leaves for output in outputs) else set()
            for place, ref in enumerate(node.inputs):
                if self._inside(chain, ref):
                    anew |= {id(chain)} if place in operands else set()
                    continue
                key = (id(chain), self._source(ref))
                wanted.setdefault(key, []).append((index, place))
                if place in operands:
                    kept.add(key)

        def late(use: tuple[int, int]) -> tuple[bool, int, int]:
            node = self.program.nodes[use[0]]
            return not (_trained(node) and self.program.type_of(node.inputs[use[1]]).requires_grad), *use

        return {key: (*min(uses, key=late), key in kept or key[0] in anew) for key, uses in wanted.items()}

    def _inside(self, chain: _Chain, ref: Ref) -> bool:
        return self.chain.get(self.root_of(ref).node) is chain

    def _source(self, ref: Ref) -> Ref:
        """The tensor that a chain reads: the root of views of all its elements, else the piece itself."""
        root = self.root_of(ref)
        return root if self.program.type_of(root).numel == self.program.type_of(ref).numel else ref

    def access(self, node: Node, eager: Access) -> Access:
        """How a node of the compiled program uses memory."""
        if is_view(node):
            return self._view(node, eager)
        chain = self.chain.get(node.index)
        writes = tuple(Ref(node.index, output) in self._leaves for output in range(len(node.outputs)))
        if chain is None:
            return eager
        reads, rereads, gives, adds = list(eager.reads), list(eager.rereads), list(eager.gives), list(eager.adds)
        for place, ref in enumerate(node.inputs):
            inside = self._inside(chain, ref)
            first = None if inside else self._first[id(chain), self._source(ref)]
            pays = first is not None and first[:2] == (node.index, place)
            reads[place] = reads[place] if pays else 0.0
            rereads[place] = rereads[place] if pays and first is not None and first[2] else 0.0
            gives[place] = pays and not self._hands_on(node, ref)
            adds[place] = pays and adds[place]
        trained = [member for member in chain.members if _trained(self.program.nodes[member])]
        return replace(
            eager,
            fused=True,
            kernel=node.index == min(chain.members),
            gradient_kernel=bool(trained) and node.index == max(trained),
            reads=tuple(reads),
            rereads=tuple(rereads),
            gives=tuple(gives),
            adds=tuple(adds),
            writes=writes,
        )

    def _hands_on(self, node: Node, ref: Ref) -> bool:
        """Whether the gradient of an operand is that of the chain's result, as it is."""
        whole = self.program.type_of(ref).numel == node.outputs[0].numel
        inside = any(self.chain.get(user) is self.chain[node.index] for user in self._users(Ref(node.index)))
        return whole and name_of(node.target) in SUMS and not inside

    def _view(self, node: Node, eager: Access) -> Access:
        """Views inside chains cost nothing, and those that copy nothing between two kernels of which one is compiled."""
        users = [user for output in range(len(node.outputs)) for user in self._users(Ref(node.index, output))]
        root = self.root_of(node.inputs[0])
        free = all(user in self.chain for user in users) or root.node in self.chain
        writes = tuple(root in self._leaves or root.node not in self.chain for _ in node.outputs)
        adds = (False,) * len(eager.adds) if free else eager.adds
        return replace(eager, fused=free, kernel=eager.kernel and not free, gradient_kernel=not free, adds=adds, writes=writes)

    def _users(self, ref: Ref) -> list[int]:
        """The operators that use a tensor, looking through views."""
        found = []
        for user, _ in self.program.users.get(ref, ()):
            node = self.program.nodes[user]
            if is_view(node):
                found += [other for output in range(len(node.outputs)) for other in self._users(Ref(user, output))]
            else:
                found.append(user)
        return found
