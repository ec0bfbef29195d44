"""Losses in clean-up: cross-entropy, NLL and log-sum-exp written in the pieces of `autotp.losses`.

All forms of PyTorch's: class indices or probabilities, class weights, label smoothing ε, any number of dims, every reduction.
With w the class weights (1 without), t a row's target, x its logits, C the classes, and lse = log-sum-exp:

    class index     w_t · (lse − x_t)
    probabilities   lse · Σ q w − Σ q w x
    smoothing       (1 − ε) · the above + ε / C · (lse · Σ w − Σ w x)

A mean divides by the global count of targets (or Σ w_t), of which ranks hold summands. 16-bit losses are computed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from autotp import losses
from autotp.collector import Call, Collector, Rewrite
from autotp.losses import MEAN, NONE
from autotp.program import Ref, Size, TensorType

aten = torch.ops.aten

LOG_SOFTMAX = (aten.log_softmax.int, aten._log_softmax.default)


@dataclass(frozen=True)
class Emitter:
    """Appends operators that take the place of one call."""

    nodes: Collector
    call: Call

    def __call__(self, suffix: str, op: Any, args: tuple[Any, ...], like: TensorType, **kwargs: Any) -> Ref:
        """Append `op` with a result of the type `like`."""
        out = self.nodes.intern(like.shape, like.hint, like.dtype, False)
        name, call = f"{self.call.name}_{suffix}", self.call
        result: Ref = self.nodes.emit(replace(call, name=name, target=op, args=args, kwargs=kwargs, outputs=(out,), several=False))
        return result

    def cast(self, ref: Ref, dtype: torch.dtype) -> Ref:
        """The tensor in another dtype."""
        kind = self.nodes.type(ref)
        return ref if kind.dtype == dtype else self("cast", aten.to.dtype, (ref, dtype), replace(kind, dtype=dtype))

    def last(self, ref: Ref, dim: int) -> Ref:
        """The tensor with dim `dim` moved to the end."""
        kind = self.nodes.type(ref)
        order = [i for i in range(len(kind.shape)) if i != dim] + [dim]
        if order == sorted(order):
            return ref
        moved = replace(kind, shape=tuple(kind.shape[i] for i in order), hint=tuple(kind.hint[i] for i in order))
        return self("rows_first", aten.permute.default, (ref, order), moved)

    def rows(self, ref: Ref) -> TensorType:
        """The type of one number for every row of (..., classes)."""
        kind = self.nodes.type(ref)
        return replace(kind, shape=kind.shape[:-1], hint=kind.hint[:-1])

    def binary(self, suffix: str, op: Any, left: Ref, right: Any) -> Ref:
        """`op` of a tensor and a number or a tensor that broadcasts to it, of the left one's type."""
        return self(suffix, op, (left, right), self.nodes.type(left))

    def sum_classes(self, ref: Ref) -> Ref:
        """Per row, the sum over the classes."""
        return self("over_classes", aten.sum.dim_IntList, (ref, [-1]), self.rows(ref))

    def sum_all(self, ref: Ref) -> Ref:
        """The sum of all elements."""
        kind = self.nodes.type(ref)
        return ref if kind.shape == () else self("total", aten.sum.default, (ref,), replace(kind, shape=(), hint=()))


def loss(nodes: Collector, call: Call) -> Ref | Call:
    """`cross_entropy_loss` and `nll_loss` in pieces."""
    emit, options = Emitter(nodes, call), _options(call)
    inputs, target, weight = call.args[0], call.args[1], options["weight"]
    of_logits = call.target is aten.cross_entropy_loss.default
    if not of_logits and (logits := _logits(emit, inputs, _class_dim(nodes, inputs))) is not None:
        inputs, of_logits = logits, True
    dtype = nodes.type(inputs).dtype
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    scores = emit.last(inputs, _class_dim(nodes, inputs))
    scores = emit.cast(scores, wide) if of_logits else scores
    weight = None if weight is None else emit.cast(weight, wide)
    if nodes.type(target).dtype.is_floating_point:
        probabilities = emit.cast(emit.last(target, _class_dim(nodes, target)), wide)
        rows, count = _against_probabilities(emit, scores, probabilities, weight, options["label_smoothing"])
    else:
        rows, count = _against_classes(emit, scores, target, weight, options, of_logits, wide)
    if options["reduction"] != NONE:
        rows = emit.sum_all(rows)
    if options["reduction"] == MEAN:
        rows = emit.binary("mean", aten.div.Tensor, rows, count(wide))
    return emit.cast(rows, call.outputs[0].dtype)


def _options(call: Call) -> dict[str, Any]:
    options = {"weight": None, "reduction": MEAN, "ignore_index": -100, "label_smoothing": 0.0}
    return options | dict(zip(options, call.args[2:], strict=False)) | call.kwargs


def _class_dim(nodes: Collector, ref: Ref) -> int:
    return min(1, len(nodes.type(ref).shape) - 1)


def _against_classes(
    emit: Emitter, scores: Ref, target: Ref, weight: Ref | None, options: dict[str, Any], of_logits: bool, wide: torch.dtype
) -> tuple[Ref, Any]:
    """The loss of every row, and what a mean divides by, for targets that are class indices."""
    ignore, classes = options["ignore_index"], emit.nodes.type(scores).shape[-1]
    rows = replace(emit.rows(scores), dtype=wide)
    picked = emit("picked", losses.pick, (scores, target), emit.rows(scores))
    if of_logits:
        maximum, sums = _maximum_and_sum(emit, scores)
        row = emit("rows", losses.rows_of_loss, (sums, maximum, picked, target, ignore, classes), rows)
    else:
        row = emit("negated", aten.neg.default, (emit.cast(picked, wide),), rows)
        row = emit("rows", losses.kept_rows, (row, target, ignore, classes), rows)
    weights = None
    if weight is not None:
        weights = emit("weights", losses.weight_of_rows, (weight, target, ignore), rows)
        row = emit.binary("weighted", aten.mul.Tensor, row, weights)
    if options["label_smoothing"]:
        smooth = emit("kept", losses.kept_rows, (_smooth(emit, scores, weight, (maximum, sums)), target, ignore, classes), rows)
        row = _mixed(emit, row, smooth, options["label_smoothing"], classes)

    def count(dtype: torch.dtype) -> Ref:
        if weights is not None:
            return emit.sum_all(weights)
        kept = emit("valid", aten.ne.Scalar, (target, ignore), replace(emit.nodes.type(target), dtype=torch.bool))
        number = emit("number", aten.sum.default, (kept,), replace(rows, shape=(), hint=(), dtype=torch.int64))
        return emit.cast(number, dtype)

    return row, count


def _against_probabilities(
    emit: Emitter, logits: Ref, probabilities: Ref, weight: Ref | None, smoothing: float
) -> tuple[Ref, Any]:
    """The loss of every row, and what a mean divides by, for targets that are probabilities of classes."""
    kind, pieces = emit.nodes.type(logits), _maximum_and_sum(emit, logits)
    if weight is not None:
        probabilities = emit.binary("weighted", aten.mul.Tensor, probabilities, weight)
    row = _expected(emit, logits, probabilities, emit.sum_classes(probabilities), pieces)
    if smoothing:
        row = _mixed(emit, row, _smooth(emit, logits, weight, pieces), smoothing, kind.shape[-1])
    number = sympy.Mul(*kind.shape[:-1])
    return row, lambda dtype: int(number) if number.is_Integer else number


def _smooth(emit: Emitter, logits: Ref, weight: Ref | None, pieces: tuple[Ref, Ref]) -> Ref:
    """lse · Σ w − Σ w x for every row."""
    if weight is not None:
        return _expected(emit, logits, weight, emit.sum_all(weight), pieces)
    return _minus(emit, pieces, emit.nodes.type(logits).shape[-1], emit.sum_classes(logits))


def _expected(emit: Emitter, logits: Ref, masses: Ref, total: Ref, pieces: tuple[Ref, Ref]) -> Ref:
    """lse · total − Σ masses · x for every row."""
    return _minus(emit, pieces, total, emit.sum_classes(emit.binary("by_mass", aten.mul.Tensor, logits, masses)))


def _minus(emit: Emitter, pieces: tuple[Ref, Ref], factor: Ref | Size, subtracted: Ref) -> Ref:
    maximum, sums = pieces
    whole = emit("log_sum_exp", losses.log_of_sum, (sums, maximum), emit.nodes.type(sums))
    return emit.binary("difference", aten.sub.Tensor, emit.binary("scaled", aten.mul.Tensor, whole, factor), subtracted)


def _mixed(emit: Emitter, row: Ref, smooth: Ref, smoothing: float, classes: Size) -> Ref:
    """(1 − ε) · row + ε / C · smooth."""
    share = emit.binary("share", aten.div.Tensor, emit.binary("smoothed", aten.mul.Tensor, smooth, smoothing), classes)
    return emit.binary("mixed", aten.add.Tensor, emit.binary("sharp", aten.mul.Tensor, row, 1 - smoothing), share)


def _maximum_and_sum(emit: Emitter, logits: Ref) -> tuple[Ref, Ref]:
    rows = emit.rows(logits)
    maximum = emit("maximum", losses.row_maximum, (logits,), rows)
    return maximum, emit("sums", losses.sum_exp, (logits, maximum), rows)


def _logits(emit: Emitter, ref: Ref, dim: int) -> Ref | None:
    """The logits of which `ref` is the log-softmax over `dim`, in its dtype; None if it is no such thing."""
    node = emit.nodes.nodes[ref.node]
    kind = node.outputs[ref.output]
    if node.target not in LOG_SOFTMAX or node.args[1] % max(len(kind.shape), 1) != dim or not kind.shape:
        return None
    return emit.cast(node.args[0], kind.dtype)


def log_sum_exp(nodes: Collector, call: Call) -> Ref | Call:
    """`logsumexp` over one dim, in pieces; a row's infinite maximum is not subtracted."""
    kind, dims = nodes.type(call.operand), call.args[1]
    if len(dims) != 1 or not kind.shape or not kind.dtype.is_floating_point:
        return call
    emit, keepdim = Emitter(nodes, call), len(call.outputs[0].shape) == len(kind.shape)
    result = _log_sum_exp(emit, call.operand, dims[0] % len(kind.shape))
    return emit("kept_dim", aten.unsqueeze.default, (result, dims[0] % len(kind.shape)), call.outputs[0]) if keepdim else result


def _log_sum_exp(emit: Emitter, ref: Ref, dim: int) -> Ref:
    scores = emit.last(ref, dim)
    rows = emit.rows(scores)
    maximum = emit("maximum", losses.row_maximum, (scores,), rows)
    infinite = emit("infinite", aten.isinf.default, (maximum,), replace(rows, dtype=torch.bool))
    maximum = emit("finite", aten.masked_fill.Scalar, (maximum, infinite, 0), rows)
    sums = emit("sums", losses.sum_exp, (scores, maximum), rows)
    return emit("log", losses.log_of_sum, (sums, maximum), rows)


def gather(nodes: Collector, call: Call) -> Ref | Call:
    """Log-probabilities picked from a log-softmax: picked logits minus the log-sum-exp, so that the classes can be split."""
    kind, out, dim = nodes.type(call.operand), call.outputs[0], call.args[1] % max(len(nodes.type(call.operand).shape), 1)
    emit = Emitter(nodes, call)
    others = [size for place, size in enumerate(kind.shape) if place != dim]
    if kind.dtype.itemsize < 4 or others != [size for place, size in enumerate(out.shape) if place != dim]:
        return call
    logits = _logits(emit, call.operand, dim)
    if logits is None:
        return call
    picked = emit("picked", aten.gather.default, (logits, dim, call.args[2]), out)
    one = replace(kind, shape=_with_one(kind.shape, dim), hint=_with_one(kind.hint, dim))
    whole = emit("kept_dim", aten.unsqueeze.default, (_log_sum_exp(emit, logits, dim), dim), one)
    return emit.binary("log_probability", aten.sub.Tensor, picked, whole)


def _with_one(sizes: tuple[Any, ...], dim: int) -> tuple[Any, ...]:
    return tuple(1 if place == dim else size for place, size in enumerate(sizes))


LOSSES: dict[Any, Rewrite] = {
    aten.cross_entropy_loss.default: loss,
    aten.nll_loss_nd.default: loss,
    aten.nll_loss.default: loss,
    aten.nll_loss2d.default: loss,
    aten.logsumexp.default: log_sum_exp,
    aten.gather.default: gather,
}
"""The rewrites of this file, by operator."""
