"""The field's words for strategies: column, row, batch, sequence, heads, vocab, expert, replicate."""

from __future__ import annotations

from fnmatch import fnmatchcase

from autotp.errors import AutotpError
from autotp.layouts import SortedCut
from autotp.program import Node, Program, Ref
from autotp.rules import Rule
from autotp.strategies import Space, Strategy

WORDS = ("column", "row", "replicate", "batch", "sequence", "heads", "vocab", "expert")
"""What a strategy may be called, on each mesh axis."""


def words_of(program: Program, node: Node, rule: Rule | None, strategy: Strategy) -> tuple[str, ...]:
    """One word per mesh axis for what the strategy splits."""
    return tuple(_word(program, node, rule, option.partition(":")[0], axis, strategy) for axis, option in enumerate(strategy.key))


def _word(program: Program, node: Node, rule: Rule | None, option: str, axis: int, strategy: Strategy) -> str:
    if node.kind == "parameter":
        return {"I": "replicate"}.get(option, f"split {option[1:2]}" if option != "I" else "")
    if rule is None or option not in rule.factors:
        return "partial" if option.startswith("P") and option != "P" else "replicate"
    uses = rule.uses[option]
    cut = next((cut for name, axes, cut in strategy.factors if name == option and axis in axes), None)
    by = {use.rows.by for use in uses if use.rows is not None} | ({cut.by} if isinstance(cut, SortedCut) else set())
    if by:
        return "expert" if "key" in by else "batch"
    if rule.work == "attention" and option in ("h", "r", "s"):
        return "sequence" if option == "s" else "heads"
    if option in rule.special:
        return "vocab"
    weights = [i for i, ref in enumerate(node.inputs) if _is_weight(program, ref)]
    in_weight = [use for use in uses if not use.output and use.index in weights]
    in_output = [use for use in uses if use.output]
    if in_weight:
        rank = max(len(rule.operands[use.index]) for use in in_weight)
        if rank == 3 and in_weight[0].dim == 0 and rule.work != "convolution":
            return "expert"
        return "column" if in_output else "row"
    first = in_output[0] if in_output else uses[0]
    return _activation_word(program, node, first.output, first.index, first.dim, option, rule)


def _activation_word(program: Program, node: Node, output: bool, index: int, dim: int, option: str, rule: Rule) -> str:
    """An activation dim: the batch comes first, the sequence second, unless heads stand between; other dims are features."""
    dims = (rule.outputs if output else rule.operands)[index]
    shape = (node.outputs[index] if output else program.type_of(node.inputs[index])).hint
    content = dims[dim]
    if dim == 0:
        return "batch" if not isinstance(content, tuple) or len(content) < 2 or content[0] == option else "sequence"
    if len(shape) == 4 and dim in (1, 2):
        sequence = _sequence_length(program)
        return "sequence" if shape[dim] == sequence and (dim == 2 or shape[2] != sequence) else "heads"
    return "sequence" if dim == 1 and len(shape) >= 3 else "column"


def _sequence_length(program: Program) -> int | None:
    for node in program.nodes:
        if node.kind == "input" and len(node.outputs[0].hint) >= 2:
            return node.outputs[0].hint[1]
    return None


def module_strategies(space: Space, chosen: dict[int, Strategy]) -> dict[str, str]:
    """Module path → its word, for every module that owns a weight or an attention; axes that differ are joined by "+"."""
    program = space.program
    found: dict[str, str] = {}
    for index in speakers(space):
        owner = space.folding.representative[index]
        path = program.nodes[index].path
        found.setdefault(path, joined(words_of(program, program.nodes[owner], space.rules[owner], chosen[owner])))
    return found


def speakers(space: Space) -> list[int]:
    """The nodes whose strategies stand for their modules, in program order.

    Those that multiply or look up a module's weight, and attentions; in a module that uses its weight in another way (a norm
    spelled out in several operators), the last one.
    """
    program = space.program
    owning: dict[str, list[int]] = {}
    last: dict[str, int] = {}
    for node in program.nodes:
        if node.kind != "op":
            continue
        rule = space.rules[space.folding.representative[node.index]]
        reads = any(_is_weight(program, ref) for ref in node.inputs) and not _is_weight(program, Ref(node.index))
        multiplies = rule is None or rule.work in ("gemm", "grouped", "convolution") or rule.special
        if (rule is not None and rule.work == "attention") or (reads and multiplies):
            owning.setdefault(node.path, []).append(node.index)
        elif reads or node.path in last:
            last[node.path] = node.index
    found = [index for indices in owning.values() for index in indices]
    found += [index for path, index in last.items() if path not in owning]
    return sorted(found)


VIEWS = frozenset("aten.transpose.int aten.t.default aten.permute.default aten.reshape.default aten.to.dtype".split())


def _is_weight(program: Program, ref: Ref) -> bool:
    """Whether a tensor is a parameter, or one turned or cast."""
    node = program.nodes[ref.node]
    return node.kind == "parameter" or (node.op in VIEWS and _is_weight(program, node.inputs[0]))


def joined(words: tuple[str, ...]) -> str:
    """One word for several mesh axes: replicating axes go without saying."""
    distinct = list(dict.fromkeys(word for word in words if word not in ("replicate", "partial")))
    return "+".join(distinct) or "replicate"


def apply_pins(space: Space, pins: dict[str, str]) -> dict[int, tuple[int, ...]]:
    """Representative node → the strategies that the pins leave.

    A pin on a module holds for those of the operators that read its weights, or its attention, that can be so. With several mesh
    axes it must hold on one of them; `replicate` means that no axis splits the weight.

    Raises:
        AutotpError: a pin's word is unknown, its pattern matches no module, or no strategy of a matching module has it.
    """
    program = space.program
    allowed: dict[int, tuple[int, ...]] = {}
    paths = {index: program.nodes[index].path for index in speakers(space)}
    for pattern, word in pins.items():
        if word not in WORDS:
            raise AutotpError(f"the pin {pattern!r}: {word!r} is none of {', '.join(WORDS)}")
        matching = [index for index, path in paths.items() if fnmatchcase(path, pattern)]
        if not matching:
            known = sorted({path for path in paths.values() if path})
            raise AutotpError(f"the pin {pattern!r} matches no module with weights; such modules are {', '.join(known[:6])}, …")
        able: set[str] = set()
        for index in matching:
            owner = space.folding.representative[index]
            options = space.strategies[owner]
            before = allowed.get(owner, tuple(range(len(options))))
            kept = tuple(n for n in before if holds(word, words_of(program, program.nodes[owner], space.rules[owner], options[n])))
            if kept:
                able.add(paths[index])
                allowed[owner] = kept
        unable = [index for index in matching if paths[index] not in able]
        if unable:
            node = program.nodes[space.folding.representative[unable[0]]]
            names = {joined(words_of(program, node, space.rules[node.index], option)) for option in space.strategies[node.index]}
            raise AutotpError(
                f"the pin {pattern!r}: {word!r} is impossible for {paths[unable[0]]} ({node.op}); it can be {', '.join(sorted(names))}"
            )
    return allowed


def holds(word: str, words: tuple[str, ...]) -> bool:
    """Whether a strategy with these words keeps a pin."""
    if word == "replicate":
        return all(other == "replicate" or (len(words) > 1 and other == "batch") for other in words)
    return word in words
