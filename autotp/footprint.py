"""The memory of one operator call: what it allocates, what shares memory, what autograd keeps. Observed, not written down.

The call runs once on meta tensors (shapes and strides without values) of the very sizes at hand, under autograd, so that PyTorch's own
kernels and derivatives say what they need. What no meta kernel can do, because its sizes depend on values, is estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from autotp.allocations import Allocations
from autotp.price.memory import saved_by
from autotp.program import op_name

aten = torch.ops.aten
ATTENTION = (aten.scaled_dot_product_attention.default, functional.scaled_dot_product_attention)
DROPOUT = (aten.dropout.default, torch.dropout)


class Spec(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False

    def make(self) -> Tensor:
        """A meta tensor like this, on memory of its own."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta", requires_grad=self.requires_grad)

    @property
    def bytes(self) -> int:
        """Bytes of the memory that the elements span."""
        if 0 in self.shape:
            return 0
        return (1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))) * self.dtype.itemsize

    @property
    def is_dense(self) -> bool:
        """Whether every byte of that memory is an element, and only one."""
        return self.bytes == prod(self.shape) * self.dtype.itemsize

    def is_laid_out_like(self, other: Spec) -> bool:
        """Whether elements lie in the same order: strides of dims of size 1 say nothing."""
        pairs = zip(self.shape, self.stride, other.stride, strict=True)
        return self.dtype == other.dtype and all(size == 1 or mine == theirs for size, mine, theirs in pairs)


def contiguous(shape: Sequence[int], dtype: torch.dtype, requires_grad: bool = False) -> Spec:
    """A tensor whose last dim is innermost."""
    stride = tuple(prod(max(size, 1) for size in shape[dim + 1 :]) for dim in range(len(shape)))
    return Spec(tuple(shape), stride, dtype, requires_grad)


def spec_of(tensor: Tensor) -> Spec:
    """What a tensor is, apart from its values."""
    return Spec(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.requires_grad)


@dataclass(frozen=True)
class Footprint:
    """What a call did. Storages are numbered: first those that went in, one per tensor, then new ones.

    Attributes:
        results: each tensor that came out, with its storage; a storage that went in makes it a view.
        is_same: per result, the operand that it is, unchanged; None for a tensor of its own.
        new: bytes of each new storage that lives on, in results or because autograd keeps it.
        kept: storages that autograd keeps for backward.
        peak: bytes allocated at the highest moment of the call; at least the sum of `new` in a forward.
        at_peak: those of the new storages, by number, that were there at that moment.
        several: whether the call gives a list of results.
    """

    results: tuple[tuple[Spec, int] | None, ...]
    is_same: tuple[int | None, ...]
    new: tuple[int, ...]
    kept: tuple[int, ...]
    peak: int
    at_peak: tuple[int, ...] = ()
    several: bool = False


@dataclass(frozen=True)
class Slot:
    """The place of a tensor in a call's arguments."""

    number: int


@dataclass(frozen=True)
class Call:
    """An operator or module, and its arguments with a `Slot` in the place of every tensor."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    estimate: tuple[Spec, ...] = ()
    """What comes out, for calls that cannot run without values."""

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """What it gives on these tensors."""
        return self.function(*_filled(self.args, tensors), **_filled(self.kwargs, tensors))


def _listed(results: Any) -> tuple[Any, ...]:
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def _filled(tree: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(tree, Slot):
        return tensors[tree.number]
    if isinstance(tree, (tuple, list)):
        return type(tree)(_filled(item, tensors) for item in tree)
    if isinstance(tree, dict):
        return {key: _filled(item, tensors) for key, item in tree.items()}
    return tree


@dataclass
class Observer:
    """Footprints of calls, each observed once.

    Args:
        on_cpu: whether attention and dropout run as on a CPU, whose fused kernel of attention takes neither dropout nor unequal heads,
            and which has none for dropout; other devices' do.
    """

    on_cpu: bool
    _forward: dict[Hashable, Footprint] = field(default_factory=dict)
    _backward: dict[Hashable, Footprint] = field(default_factory=dict)

    def forward(self, call: Call, key: Hashable, operands: tuple[Spec, ...]) -> Footprint:
        """The footprint of the call itself. Calls of equal `key` and operands are the same."""
        if (key, operands) not in self._forward:
            self._forward[key, operands] = self._observe(call, operands, None)
        return self._forward[key, operands]

    def backward(self, call: Call, key: Hashable, operands: tuple[Spec, ...], gradients: tuple[Spec | None, ...]) -> Footprint:
        """The footprint of the call's backward, which takes the gradients of its results (those there are), one storage each.

        Its results are the gradients of the operands. What only this call kept is freed on the way, and counts as such.
        """
        whole = (key, operands, gradients)
        if whole not in self._backward:
            self._backward[whole] = self._observe(call, operands, gradients)
        return self._backward[whole]

    def _observe(self, call: Call, operands: tuple[Spec, ...], gradients: tuple[Spec | None, ...] | None) -> Footprint:
        try:
            with _Fused(self.on_cpu):
                return _forward(call, operands) if gradients is None else _backward(call, operands, gradients)
        except (RuntimeError, NotImplementedError, ValueError, TypeError):  # no meta kernel, or it asks for values
            return _estimated(call, operands) if gradients is None else _estimated_backward(operands, gradients)


class _Fused(TorchFunctionMode):
    """Runs attention and dropout as the fused kernels that the device would pick: on meta tensors PyTorch composes them."""

    def __init__(self, on_cpu: bool) -> None:
        super().__init__()
        self.on_cpu = on_cpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ATTENTION:
            fused = self.attention(*args, **(kwargs or {}))
            if fused is not None:
                return fused
        if func in DROPOUT and not self.on_cpu and self.masks(*args, **(kwargs or {})):
            return torch.native_dropout(*args, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))

    def masks(self, input: Tensor, p: float, train: bool) -> bool:
        """Whether dropout keeps a mask of booleans (`is_fused_kernel_acceptable` in ATen/native/Dropout.cpp)."""
        return train and 0 < p < 1 and input.numel() > 0

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor | None:  # fmt: skip
        """The fused kernel's result, or None where it cannot be used; a CPU's takes neither dropout nor a mask with gradient."""
        wanted = attn_mask is not None and attn_mask.requires_grad
        if q.ndim != 4 or q.shape[-1] != v.shape[-1] or not (q.numel() and k.numel()) or (self.on_cpu and (dropout_p or wanted)):
            return None
        mask = None if attn_mask is None else attn_mask.detach()
        fused = aten._scaled_dot_product_flash_attention_for_cpu
        result: Tensor = fused(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)[0]
        return result


def _forward(call: Call, operands: tuple[Spec, ...]) -> Footprint:
    tensors = [spec.make() for spec in operands]
    kept: list[int] = []
    counter = Allocations()
    own = {counter.see(tensor): place for place, tensor in enumerate(tensors)}
    before = counter.bytes

    def keep(tensor: Tensor) -> Tensor:
        kept.append(counter.see(tensor))
        return tensor

    with counter, saved_tensors_hooks(keep, _same):
        results = call.run(tensors)
    found = [result if isinstance(result, Tensor) else None for result in _listed(results)]
    storages = [None if result is None else counter.see(result) for result in found]
    new: dict[int, int] = {}
    for number in (*(s for s in storages if s is not None), *kept):
        if number not in own and number not in new and number in counter.sizes:
            new[number] = len(own) + len(new)
    number_of = own | new
    sizes = tuple(counter.sizes[number] for number in new)
    return Footprint(
        tuple(None if r is None or s is None else (spec_of(r), number_of[s]) for r, s in zip(found, storages, strict=True)),
        tuple(next((place for place, tensor in enumerate(tensors) if r is tensor), None) for r in found),
        sizes,
        tuple(sorted({number_of[number] for number in kept if number in number_of})),
        max(counter.peak - before, sum(sizes)),
        tuple(new.values()),
        isinstance(results, (tuple, list)),
    )


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _backward(call: Call, operands: tuple[Spec, ...], gradients: tuple[Spec | None, ...]) -> Footprint:
    tensors = [spec.make() for spec in operands]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    highest: set[int] = set()

    def remember(seen: Allocations) -> None:
        highest.clear()
        highest.update(seen.sizes)

    counter = Allocations(remember)
    for tensor in tensors:
        counter.see(tensor)
    with counter:
        results = _listed(call.run(tensors))
        arrived = [(result, spec.make()) for result, spec in zip(results, gradients, strict=True) if spec is not None]
        own = {counter.see(gradient): place for place, (_, gradient) in enumerate(arrived)}
        counter.peak = before = counter.bytes
        found = torch.autograd.grad([r for r, _ in arrived], wanted, [g for _, g in arrived], allow_unused=True)
    by_operand = iter(found)
    made = [next(by_operand) if tensor.requires_grad else None for tensor in tensors]
    new: dict[int, int] = {}
    for gradient in made:
        if gradient is not None and (number := counter.see(gradient)) not in own and number not in new:
            new[number] = len(own) + len(new)
    number_of = own | new
    return Footprint(
        tuple(None if g is None else (spec_of(g), number_of[counter.see(g)]) for g in made),
        tuple(next((place for place, (_, gradient) in enumerate(arrived) if g is gradient), None) for g in made),
        tuple(counter.sizes[number] for number in new),
        (),
        max(counter.peak - before, 0),
        tuple(place for number, place in new.items() if number in highest),
    )


def _estimated(call: Call, operands: tuple[Spec, ...]) -> Footprint:
    """The same by the table of operators: fresh, contiguous results."""
    sizes = tuple(spec.bytes for spec in call.estimate)
    first = len(operands)
    results = tuple((spec, first + place) for place, spec in enumerate(call.estimate))
    inputs, outputs = saved_by(op_name(call.function), first) if any(s.requires_grad for s in call.estimate) else ((), ())
    kept = tuple(place for place in inputs if place < first) + tuple(first + place for place in outputs)
    return Footprint(results, (None,) * len(results), sizes, kept, sum(sizes), several=len(results) > 1)


def _estimated_backward(operands: tuple[Spec, ...], gradients: tuple[Spec | None, ...]) -> Footprint:
    first = sum(gradient is not None for gradient in gradients)
    wanted = [place for place, spec in enumerate(operands) if spec.requires_grad]
    fresh = {place: contiguous(operands[place].shape, operands[place].dtype) for place in wanted}
    results = tuple((fresh[place], first + wanted.index(place)) if place in fresh else None for place in range(len(operands)))
    sizes = tuple(spec.bytes for spec in fresh.values())
    return Footprint(results, (None,) * len(operands), sizes, (), sum(sizes), tuple(range(first, first + len(wanted))))

