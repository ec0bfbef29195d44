"""Buffers that are written where they lie: which operators of a program may change their operand instead of making a new tensor.

Clean-up made every write pure. For a key/value cache that would be two copies of the cache per token; where nothing else reads the old
value, and no gradient needs it, the rewriter writes in place again, and the operator costs only what it writes.
"""

from __future__ import annotations

from typing import Any

import torch

from autotp import _torch
from autotp.price.storage import is_view
from autotp.program import Program, Ref


def writes_in_place(program: Program) -> dict[int, int]:
    """Operator that may write into a buffer → that buffer (both by node).

    It makes the buffer's new value, by an operator that PyTorch has in place too; it alone reads the old value; its result is no output of
    the program, nor a view of one, so that nobody holds it when the next call writes again. Programs with gradients write nothing in place.
    """
    if any(output.requires_grad for node in program.nodes for output in node.outputs):
        return {}
    found = {}
    for buffer, value in program.updated.items():
        writer = program.nodes[_viewed(program, value).node]
        old = Ref(buffer)
        if writer.kind != "op" or in_place_variant(writer.target) is None or not writer.args or writer.args[0] != old:
            continue
        if program.users.get(old) == ((writer.index, 0),) and not _leaves(program, {old, Ref(writer.index)}, buffer):
            found[writer.index] = buffer
    return found


def in_place_variant(target: Any) -> Any | None:
    """`aten.index_copy_.default` for `aten.index_copy.default`; None where there is no such operator."""
    return _torch.in_place_variant(target) if isinstance(target, torch._ops.OpOverload) else None


def _leaves(program: Program, tensors: set[Ref], buffer: int) -> bool:
    """Whether the memory of these tensors is given away: as an output, or as the new value of another buffer."""
    given = [value for value in program.outputs if isinstance(value, Ref)]
    given += [value for other, value in program.updated.items() if other != buffer]
    return any(_viewed(program, ref) in tensors for ref in given)


def _viewed(program: Program, ref: Ref) -> Ref:
    """The tensor whose memory a tensor may share: what its views show, in the end."""
    while is_view(program.nodes[ref.node]):
        ref = program.nodes[ref.node].inputs[0]
    return ref
