"""How a split random operator draws what one device draws: numbers for the whole tensor, of which a rank uses its piece."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autotp.errors import AutotpError
from autotp.layouts import Layout
from autotp.program import Size
from autotp.rules.attention import dropout_of
from autotp.rules.creation import SHAPE
from autotp.rules.language import Call, Local, LocalStart, call_of
from autotp.runtime.exact_random import Whole
from autotp.strategies import Space

aten = torch.ops.aten

SHAPED = frozenset(
    f"aten.{name}"
    for name in "bernoulli.p exponential.default uniform.default cauchy.default log_normal.default normal_functional.default".split()
)
"""Operators that look at the shape of their operand, not at its values."""


@dataclass(frozen=True)
class Form:
    """A split random operator in two parts.

    Attributes:
        draw: from a `Whole` and the arguments to the random numbers of the whole tensor.
        shape: of the whole tensor of numbers, which is split like the operator's first output.
        target, args, kwargs: the rest of the operator, a function of this rank's numbers and the arguments.
        like_output: whether the numbers stand in memory like the elements of the output; else in order.
    """

    draw: Callable[..., Tensor]
    shape: tuple[Size, ...]
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    like_output: bool = False


def can_be_split(call: Call) -> bool:
    """Whether a random operator has a `Form`: what it draws must not depend on values that a rank does not hold."""
    return call.op in FORMS


def drawn_whole(space: Space, allowed: Mapping[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
    """Of the `allowed` strategies (representative node → their numbers; all where it is missing) those that can draw as one device does."""
    found = dict(allowed)
    for index, rule in space.rules.items():
        node = space.program.nodes[index]
        if rule is not None and rule.random and not can_be_split(call_of(node, space.program.type_of)):
            options = space.strategies[index]
            before = allowed.get(index, tuple(range(len(options))))
            found[index] = tuple(number for number in before if not any(layout.splits for layout in options[number].outputs))
    return found


def exact_form(local: Local) -> Form | None:
    """The form of a random operator; None if it draws so by itself, being whole on every rank.

    Raises:
        AutotpError: it is split, and has no form.
    """
    whole = not any(layout.splits for layout in local.outputs)
    if not can_be_split(local.call):
        if whole:
            return None
        raise AutotpError(
            f"the plan splits {local.call.op}{local.call.where}, and with randomness='exact' that operator must draw for whole tensors: "
            "let parallelize make the plan"
        )
    form = FORMS[local.call.op](local)
    return form if form.like_output or not whole else None


def layout_of_numbers(layout: Layout) -> Layout:
    """How the numbers are split where the first output lies so."""
    kinds = tuple("S" if kind == "S" else "I" for kind in layout.kinds)
    return Layout(kinds, layout.splits)


def _dropout(local: Local) -> Form:
    return Form(_drop_whole, local.call.outputs[0].shape, _dropped, local.args, local.kwargs, like_output=True)


def _drop_whole(whole: Whole, x: Tensor, p: float, train: bool = True) -> Tensor:
    return torch.dropout(whole.filled(1, x.dtype, x.device), p, True)


def _dropped(numbers: Tensor, x: Tensor, p: float, train: bool = True) -> Tensor:
    return x * numbers


def _native_dropout(local: Local) -> Form:
    return Form(_native_drop_whole, local.call.outputs[0].shape, _dropped_and_mask, local.args, local.kwargs, like_output=True)


def _native_drop_whole(whole: Whole, x: Tensor, p: float, train: bool | None = True) -> Tensor:
    numbers: Tensor = aten.native_dropout(whole.filled(1, x.dtype, x.device), p, True)[0]
    return numbers


def _dropped_and_mask(numbers: Tensor, x: Tensor, p: float, train: bool | None = True) -> tuple[Tensor, Tensor]:
    return x * numbers, numbers != 0


def _shaped(local: Local) -> Form:
    def draw(whole: Whole, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        numbers: Tensor = local.target(whole.filled(0, x.dtype, x.device), *args, **kwargs)
        return numbers

    return Form(draw, local.call.outputs[0].shape, _numbers, local.args, local.kwargs, like_output=True)


def _created(local: Local) -> Form:
    place = SHAPE[local.call.op]

    def draw(whole: Whole, *args: Any, **kwargs: Any) -> Tensor:
        numbers: Tensor = local.target(*args[:place], list(whole.sizes), *args[place:], **kwargs)
        return numbers

    args = (*local.args[:place], *local.args[place + 1 :])
    return Form(draw, local.call.outputs[0].shape, _numbers, args, local.kwargs)


def _numbers(numbers: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return numbers


# ---- attention ------------------------------------------------------------------------------------------------------


def _attention(local: Local) -> Form:
    """Fused attention with dropout drops attention weights: written out, as PyTorch does where no kernel fuses it."""
    call = local.call
    output, keys = call.outputs[0].shape, call.tensors[1].shape[-2]
    mask = local.args[3] if len(local.args) > 3 else local.kwargs.get("attn_mask")
    causal = bool(call.argument(5, "is_causal", False))
    split = local.operand_split(0, len(output) - 2)
    start = LocalStart(split) if causal and split is not None else 0 if causal else None
    scale, grouped = call.kwargs.get("scale"), bool(call.kwargs.get("enable_gqa", False))
    draw = partial(_drop_weights, dropout_of(call))
    return Form(draw, (*output[:-1], keys), attention_of_weights, (*local.args[:3], mask, start, scale, grouped), {})


def _drop_weights(p: float, whole: Whole, q: Tensor, *_: Any) -> Tensor:
    return torch.dropout(whole.filled(1, _wide(q.dtype), q.device), p, True)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def attention_of_weights(
    numbers: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    start: int | None = None,
    scale: float | None = None,
    grouped: bool = False,
) -> Tensor:
    """Attention in which each weight is multiplied by a number: softmax(scale q kᵀ) ∘ numbers, times v.

    Args:
        numbers: (..., heads, rows, keys).
        q: (..., heads, rows, e); k: (..., kv heads, keys, e); v: (..., kv heads, keys, f).
        mask: booleans (True takes part) or summands, which broadcast to `numbers`.
        start: position of the first row, if row i sees the keys j <= i only; None: it sees all.
        scale: 1/√e by default; grouped: each head of k and v serves several of q.

    Returns:
        (..., heads, rows, f). Computed in float32 at least, as PyTorch's own composition of it.
    """
    dtype, wide = q.dtype, _wide(q.dtype)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if grouped and q.shape[-3] and k.shape[-3]:
        k, v = (heads.repeat_interleave(q.shape[-3] // heads.shape[-3], -3) for heads in (k, v))
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    if start is not None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(start)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights: Tensor = aten._safe_softmax(scores, -1)
    return (weights * numbers @ v).to(dtype)


FORMS: dict[str, Callable[[Local], Form]] = {
    "aten.dropout.default": _dropout,
    "aten.native_dropout.default": _native_dropout,
    "aten.scaled_dot_product_attention.default": _attention,
    **dict.fromkeys(SHAPED, _shaped),
    **{op: _created for op in SHAPE if op.split(".")[1] in ("rand", "randn", "randint", "normal")},
}
"""The operators of which a rank can use a piece."""
