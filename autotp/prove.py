"""Prove a rule by running it: every strategy that it allows, on virtual ranks, against the unsplit operator.

    >>> import torch
    >>> from autotp.prove import prove_rule
    >>> proof = prove_rule("aten::linear", torch.randn(2, 5), torch.randn(7, 5), torch.randn(7))
    >>> sorted(proof.factors)
    ['dim-1', 'i', 'o']

The operands are cut as each strategy says (random summands where it says partial), each rank runs the call that the rewriter
emits, and the outputs and all gradients are put together by the definitions of the layouts (`autotp.simulate`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autotp import _torch
from autotp.decisions import Decisions
from autotp.definitions import coordinates, gather, gather_gradient, gradient_layout, scatter
from autotp.errors import AutotpError
from autotp.fold import unfolded
from autotp.layouts import Layout, Segment, Split
from autotp.program import Node, Program, Ref, TensorType, op_name
from autotp.rewrite import rewrite
from autotp.rules import Rule
from autotp.rules.registry import identify
from autotp.runtime.random import RandomCall
from autotp.runtime.sorted_rows import orders_in
from autotp.simulate import Simulation
from autotp.strategies import Space, Strategy, build_space

Mesh = tuple[int, ...]

MESHES: tuple[Mesh, ...] = ((2,), (3,), (4,), (2, 2))
"""The meshes on which rules are proved."""

RANK_FAILS = "a rank fails: "
PROBABILITIES = ("p", "dropout_p", "dropout")
"""What operators call the probability of dropping an element."""


@dataclass(frozen=True)
class Proof:
    """What was run to prove a rule for one call.

    Attributes:
        op: the operator's name.
        strategies: how many strategies were run, over all meshes.
        factors: the factors that were split; empty if the rule only allows replication for this call.
        partial: how often an operand was partial.
    """

    op: str
    strategies: int
    factors: frozenset[str]
    partial: int


def prove_rule(
    operator: str | Callable[..., Any],
    *args: Any,
    gradient: bool = True,
    meshes: Sequence[Mesh] = MESHES,
    limit: int | None = None,
    **kwargs: Any,
) -> Proof:
    """Prove the rule of an operator for one call.

    Use sizes that do not divide evenly over the meshes, such as 5, 7 and 3, so that uneven and empty pieces occur; a size of 6
    or more shows more of the ways to cut. Every dim is also cut in two segments, as a fused projection is.

    A random operator is proved in two steps: with probability 0 it must be right like any other; with its own probability it
    must draw the same numbers as the unsplit operator wherever its output is not sharded, and equal ones wherever two ranks
    hold the same piece.

    Args:
        operator: `"mylib::op"` or `"mylib::op.overload"`, what `torch.library.custom_op` returned, an operator of `torch.ops`,
            or a plain function that has a rule.
        args, kwargs: an example call, lists of tensors allowed. Use float64: results are compared to 1e-9 relative to their
            largest magnitude (if a coarser dtype takes part, to 100 times its epsilon).
        gradient: prove the gradients of all floating-point operands too.
        meshes: the meshes to prove it on.
        limit: run at most so many strategies per mesh, drawn at random but always the same ones. None: all.

    Raises:
        AutotpError: no rule for this call; the call itself fails; or the rule is wrong, with the mesh, the strategy and what
            differs.

    Example:
        ```python
        autotp.rule("mylib::scale", "... d, d -> ... d", linear=((0,), (1,)))
        autotp.prove_rule("mylib::scale", torch.randn(3, 7).double(), torch.randn(7).double())
        ```
    """
    target = _resolve(operator)
    example = _Example(target, args, kwargs, gradient)
    whole = build_space(example.program, unfolded(example.program), (1,))
    rule = whole.rules[example.node.index]
    if rule is None:
        raise AutotpError(
            f"{example.node.op} has no rule for this call; register one with autotp.rule(...) and prove it then"
        )
    if rule.random and (certain := _without_chance(target, args, kwargs)) is not None:
        prove_rule(target, *certain[0], gradient=gradient, meshes=meshes, limit=limit, **certain[1])
    count, partials = 0, 0
    factors: set[str] = set()
    for mesh in meshes:
        space = build_space(example.program, unfolded(example.program), mesh, _segmented(example.program, len(mesh)))
        strategies = list(space.strategies[example.node.index])
        if limit is not None and len(strategies) > limit:
            strategies = random.Random(0).sample(strategies, limit)
        for strategy in strategies:
            problem = example.disproof(space, strategy, rule)
            if problem:
                raise AutotpError(_verdict(example.node, mesh, strategy, problem))
            factors.update(name for name, _, _ in strategy.factors)
            partials += any("P" in layout.kinds for layout in strategy.operands)
        count += len(strategies)
    return Proof(example.node.op, count, frozenset(factors), partials)


def _resolve(operator: str | Callable[..., Any]) -> Callable[..., Any]:
    found = identify(operator)[1]
    if found is None:
        raise AutotpError(
            f"there is no operator {operator!r}; define it with torch.library first, or name its overload as in 'aten::add.Tensor'"
        )
    return found


def _verdict(node: Node, mesh: Mesh, strategy: Strategy, problem: str) -> str:
    operands, outputs = ("; ".join(str(layout) for layout in side) for side in (strategy.operands, strategy.outputs))
    advice = "mark the factor with '^' if it cannot be split, or the operand as not linear"
    if problem.startswith(RANK_FAILS):
        advice = "give a `local` function that calls the operator as it must be called on a piece, or mark the factor with '^'"
    return (
        f"the rule of {node.op} is wrong: on mesh {mesh} with {', '.join(strategy.key)} (operands {operands}, outputs {outputs}) "
        f"{problem}; {advice}"
    )


class _Example:
    """One call: its program of a single operator, its operands, results and gradients on a single device."""

    def __init__(
        self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], gradient: bool
    ) -> None:
        self.gradient = gradient
        self.operands: list[Tensor] = []
        args, kwargs = _positional(target, args, kwargs)
        call = _torch.tree_map_only(Tensor, self._operand, (args, kwargs))
        name = op_name(target)
        try:
            outputs = self.call(target, call, self.operands)
            random = torch.Generator().manual_seed(0)
            self.seeds = [_random_like(output, random) if output.requires_grad else None for output in outputs]
            self.gradients = self._gradients(self.operands, outputs, self.seeds)
        except Exception as error:
            if "autograd formula" in str(error):
                raise AutotpError(
                    f"{name} has no autograd formula: no model that uses it can be trained; give it one with its "
                    "register_autograd(...), or prove it with gradient=False for inference alone"
                ) from error
            raise AutotpError(
                f"{name} cannot be called so, even on a single device: {str(error).partition(chr(10))[0]}; correct the example "
                "(or pass gradient=False if the operator has no gradient)"
            ) from error
        self.outputs = [output.detach() for output in outputs]
        self.tolerance = max(_tolerance(tensor.dtype) for tensor in (*self.operands, *outputs))
        nodes = [
            Node(i, f"operand_{i}", "input", f"operand_{i}", (), {}, (_type_of(tensor),))
            for i, tensor in enumerate(self.operands)
        ]
        self.node = Node(len(nodes), "call", "op", target, call[0], call[1], tuple(map(_type_of, outputs)))
        self.program = Program(
            nodes=(*nodes, self.node),
            outputs=tuple(Ref(self.node.index, i) for i in range(len(outputs))),
            updates=(),
            in_spec=None,
            out_spec=None,
            in_names=tuple(node.name for node in nodes),
            in_constants={},
            symbols={},
            ranges={},
            aliases={},
            persistent=frozenset(),
            constants={},
        )

    def _operand(self, tensor: Tensor) -> Ref:
        differentiable = self.gradient and (tensor.is_floating_point() or tensor.is_complex())
        self.operands.append(tensor.detach().clone().requires_grad_(differentiable))
        return Ref(len(self.operands) - 1)

    def call(self, target: Callable[..., Any], call: Any, operands: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of a call whose tensors are `Ref`s into `operands`."""
        args, kwargs = _torch.tree_map_only(Ref, lambda ref: operands[ref.node], call)
        result = target(*args, **kwargs)
        return list(result) if isinstance(result, (tuple, list)) else [result]

    def _gradients(
        self, operands: Sequence[Tensor], outputs: Sequence[Tensor], seeds: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The gradient of every operand that can have one, zeros where the outputs do not depend on it."""
        wanted = [tensor for tensor in operands if tensor.requires_grad]
        pairs = [(output, seed) for output, seed in zip(outputs, seeds, strict=True) if output.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if wanted and pairs:
            found = torch.autograd.grad(
                [output for output, _ in pairs], wanted, [seed for _, seed in pairs], allow_unused=True
            )
        given = iter(found)
        return [
            None
            if not tensor.requires_grad
            else torch.zeros_like(tensor)
            if (gradient := next(given)) is None
            else gradient
            for tensor in operands
        ]

    def order(self, layout: Layout) -> Tensor | None:
        """The operand that holds the order of a layout's sorted rows, if it has any."""
        return next((self.operands[order] for order in orders_in(layout)), None)

    def disproof(self, space: Space, strategy: Strategy, rule: Rule) -> str:
        """What goes wrong when the call runs as `strategy` says; "" if nothing does."""
        mesh = space.mesh
        inputs = dict(enumerate(strategy.operands))
        chosen = {index: options[0] for index, options in space.strategies.items()} | {self.node.index: strategy}
        decisions = Decisions(chosen, {}, inputs, dict(enumerate(strategy.outputs)))
        ranks = coordinates(mesh)
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(inputs) + len(strategy.outputs))]
        try:
            simulation = Simulation([rewrite(space, decisions, at, gradient=self.gradient) for at in ranks])
            operands = [
                [
                    scatter(full.detach(), layout, mesh, at, random, self.order(layout)).requires_grad_(full.requires_grad)
                    for full, layout, random in zip(self.operands, strategy.operands, generators)
                ]
                for at in ranks
            ]
            outputs = simulation.forward([[]] * len(ranks), operands)
            gradients = []
            for at, mine, results in zip(ranks, operands, outputs, strict=True):
                seeds = [
                    None if seed is None else scatter(seed, gradient_layout(layout), mesh, at, random, self.order(layout))
                    for seed, layout, random in zip(
                        self.seeds, strategy.outputs, generators[len(inputs) :], strict=True
                    )
                ]
                gradients.append(self._gradients(mine, results, seeds))
        except Exception as error:
            return f"{RANK_FAILS}{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        expected, wanted = self.outputs, self.gradients
        if rule.random:
            reference = self._drawn(strategy)
            if reference is None:
                return self._compare(
                    "output", list(zip(*outputs)), [None] * len(expected), strategy.outputs, gather, mesh
                )
            expected, wanted = reference
        return self._compare("output", list(zip(*outputs)), expected, strategy.outputs, gather, mesh) or self._compare(
            "gradient of operand", list(zip(*gradients)), wanted, strategy.operands, gather_gradient, mesh
        )

    def _drawn(self, strategy: Strategy) -> tuple[list[Tensor], list[Tensor | None]] | None:
        """Outputs and gradients of the unsplit random operator under the ranks' seed; None if the output is sharded."""
        if any(layout.splits for layout in (*strategy.outputs, *strategy.operands)):
            return None
        outputs = self.call(RandomCall(self.node.target, 0), (self.node.args, self.node.kwargs), self.operands)
        return [output.detach() for output in outputs], self._gradients(self.operands, outputs, self.seeds)

    def _compare(
        self,
        what: str,
        locals: Sequence[Sequence[Any]],
        expected: Sequence[Tensor | None],
        layouts: Sequence[Layout],
        put_together: Callable[..., Tensor],
        mesh: Mesh,
    ) -> str:
        for index, (mine, want, layout) in enumerate(zip(locals, expected, layouts, strict=True)):
            if any(tensor is None for tensor in mine):
                continue
            mine = [tensor.detach() for tensor in mine]
            try:
                found = put_together(mine, layout, mesh, self.tolerance, self.order(layout))
            except AutotpError as error:
                return f"{what} {index} is not what its layout says ({error})"
            if want is not None and (difference := _difference(found, want, self.tolerance)):
                return f"{what} {index} {difference}"
        return ""


def _positional(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with arguments passed by position where the operator's schema allows it, as a trace writes them."""
    rest, found = dict(kwargs), list(args)
    for argument in target._schema.arguments[len(args) :] if hasattr(target, "_schema") else ():
        if argument.kwarg_only or not rest:
            break
        found.append(rest.pop(argument.name, argument.default_value))
    return tuple(found), rest


def _type_of(tensor: Tensor) -> TensorType:
    return TensorType(tuple(tensor.shape), tuple(tensor.shape), tensor.dtype, tensor.requires_grad)


def _random_like(tensor: Tensor, random: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=random, dtype=tensor.dtype).to(tensor.device)


def _tolerance(dtype: torch.dtype) -> float:
    return max(1e-9, 100 * torch.finfo(dtype).eps) if dtype.is_floating_point or dtype.is_complex else 0.0


def _difference(found: Tensor, want: Tensor, tolerance: float) -> str:
    """How the tensors differ, in words; "" if they agree."""
    want = want.detach()
    if found.shape != want.shape or found.dtype != want.dtype:
        return f"has shape {list(found.shape)} and {found.dtype} instead of {list(want.shape)} and {want.dtype}"
    if not (want.is_floating_point() or want.is_complex()):
        return "" if torch.equal(found, want) else "differs from that of the unsplit operator"
    finite = want[torch.isfinite(want)].abs()
    allowed = tolerance * (1.0 + (float(finite.max()) if finite.numel() else 0.0))
    if torch.allclose(found, want, rtol=0.0, atol=allowed, equal_nan=True):
        return ""
    return f"differs from that of the unsplit operator by {float((found - want).abs().nan_to_num(torch.inf).max()):.3g}"


def _segmented(program: Program, axes: int) -> Mapping[Ref, Layout]:
    """Layouts that make every operand dim of size 2 or more a candidate for a cut in two segments (only their cuts are read)."""
    found = {}
    for node in program.nodes[:-1]:
        splits = [
            Split(dim, (0,), (Segment(1, size // 2, 1), Segment(1, size - size // 2, 1)))
            for dim, size in enumerate(node.outputs[0].hint)
            if size > 1
        ]
        found[Ref(node.index)] = Layout(("S",) * axes, tuple(splits))
    return found


def _without_chance(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The same call with probability 0; None if the operator has none."""
    schema = getattr(target, "_schema", None)
    for place, argument in enumerate(schema.arguments if schema else ()):
        if argument.name in PROBABILITIES:
            given = args[place] if place < len(args) else kwargs.get(argument.name, 0.0)
            if not given:
                return None
            if place < len(args):
                return (*args[:place], 0.0, *args[place + 1 :]), kwargs
            return args, {**kwargs, argument.name: 0.0}
    return None
