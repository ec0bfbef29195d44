"""Wrong rules, planted one by one in place of the right one: each makes the proof fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from all_samples import SAMPLES
from rule_samples import PREDICATE
from sampling import Sample, call, integers, positive, real, target_of

from autotp.errors import AutotpError
from autotp.prove import prove_rule
from autotp.rules import RULES, bind
from autotp.rules.indexing import embedding, masked_embedding
from autotp.rules.language import Call, Local, LocalSize, Part, Rule
from autotp.rules.registry import RuleFunction

aten = torch.ops.aten


def pattern(text: str, **options: Any) -> RuleFunction:
    """A rule that is one pattern."""
    return lambda call: bind(text, call, **options)


def to_output_shape(target: Any) -> Any:
    """A local call that passes the output's local shape."""
    return lambda local: (target, (local.args[0], local.output_shape()), {})


def blind_split(local: Local) -> Any:
    """Whatever columns a rank holds, the first third is taken for q, the next for k."""
    return (
        aten.split_with_sizes.default,
        (local.args[0], [shape[1] for shape in map(local.output_shape, range(3))], 1),
        {},
    )


def first_rows(local: Local) -> Any:
    """A masked lookup that forgets which rows of the table a rank holds."""
    return masked_embedding, (*local.args[:2], 0), {}


def by_rows(call: Call) -> Rule | None:
    """A lookup that reckons with one offset, whose rows may nevertheless be cut in several runs."""
    rule = embedding(call)
    assert rule is not None
    return replace(rule, special=frozenset())


def first_classes(local: Local) -> Any:
    """A masked pick that forgets which classes a rank holds."""
    split = local.operand_split(0, 1)
    return local.target, (*local.args[:2], 0, *([LocalSize(split)] if split else [])), {}


def swapped_parts(call: Call) -> Rule:
    """`cat` of 6 and 3 columns as if it were of 3 and 6."""
    return Rule({"c": 9}, (((), Part("c", 0, 3)), ((), Part("c", 3, 9))), (((), ("c",)),))


QUERY, KEY = real(2, 6, 5, 4), real(2, 2, 5, 4)
ATTENTION = "aten.scaled_dot_product_attention.default"
KEYS = "b h t^ e^, b h t^ f^, s t^"

WRONG: dict[str, tuple[str, RuleFunction, Sample]] = {
    "summed factor named twice": ("aten.mm.default", pattern("m k, l n -> m n"), call(real(5, 3), real(3, 7))),
    "summed factor kept": ("aten.mm.default", pattern("m k, n k -> m n"), call(real(5, 5), real(5, 5))),
    "linear in both factors at once": (
        "aten.mm.default",
        pattern("m k, k n -> m n", linear=((0, 1),)),
        call(real(5, 3), real(3, 7)),
    ),
    "bias is no summand": (
        "aten.linear.default",
        pattern("... i, o i, o -> ... o"),
        call(real(3, 5), real(7, 5), real(7)),
    ),
    "linear without the bias": (
        "aten.linear.default",
        pattern("... i^, o i^, o -> ... o", linear=((0,),)),
        call(real(3, 5), real(7, 5), real(7)),
    ),
    "bias of rows": ("aten.addmm.default", pattern("+m, m k, k n -> m n"), call(real(5), real(5, 3), real(3, 5))),
    "batch summed": ("aten.bmm.default", pattern("b m k, b k n -> b m k"), call(real(3, 5, 5), real(3, 5, 5))),
    "sum taken for a maximum": (
        "aten.sum.dim_IntList",
        pattern("d0 d1 -> d0", reduction="M"),
        call(real(3, 5), [1], gradient=False),
    ),
    "maximum taken for a sum": ("aten.amax.default", pattern("d0 d1 -> d0"), call(real(4, 8), [1])),
    "mean taken for a sum": ("aten.mean.dim", pattern("d0 d1 -> d0"), call(real(3, 5), [1])),
    "variance split": ("aten.var.correction", pattern("d0 d1 -> d0"), call(real(3, 8), [1])),
    "logsumexp split": ("aten.logsumexp.default", pattern("d0 d1 -> d0"), call(real(3, 8), [1])),
    "softmax split": ("aten.softmax.int", pattern("... d -> ... d"), call(real(3, 5), -1)),
    "layer_norm split": (
        "aten.layer_norm.default",
        pattern("... d, d, d -> ... d"),
        call(real(3, 5), [5], real(5), real(5)),
    ),
    "weight of the rows": ("aten.rms_norm.default", pattern("d e^, d -> d e^"), call(real(5, 5), [5], real(5))),
    "cumsum split": ("aten.cumsum.default", pattern("d0 d1 -> d0 d1"), call(real(3, 5), 1)),
    "sort split": ("aten.sort.default", pattern("d0 d1 -> d0 d1, d0 d1"), call(real(3, 5))),
    "topk split": ("aten.topk.default", pattern("d0 d1 -> d0 d1, d0 d1"), call(real(3, 5), 5)),
    "tril split": ("aten.tril.default", pattern("d0 d1 -> d0 d1"), call(real(5, 5))),
    "flip split": ("aten.flip.default", pattern("d0 d1 -> d0 d1"), call(real(3, 5), [1])),
    "roll split": ("aten.roll.default", pattern("d0 d1 -> d0 d1"), call(real(3, 5), [1], [1])),
    "glu split": ("aten.glu.default", pattern("d0 (d1 n^) -> d0 d1"), call(real(3, 10), 1)),
    "scalar added to summands": ("aten.add.Tensor", pattern("..., ... -> ...", linear=((0,),)), call(real(3, 5), 1.5)),
    "tensor added to summands": (
        "aten.add.Tensor",
        pattern("..., ... -> ...", linear=((0,),)),
        call(real(3, 5), real(5)),
    ),
    "product of summands": (
        "aten.mul.Tensor",
        pattern("..., ... -> ...", linear=((0, 1),)),
        call(real(3, 5), real(3, 5)),
    ),
    "denominator of summands": (
        "aten.div.Tensor",
        pattern("..., ... -> ...", linear=((1,),)),
        call(real(3, 5), positive(3, 5)),
    ),
    "gelu of summands": ("aten.gelu.default", pattern("... -> ...", linear=((0,),)), call(real(3, 5))),
    "square of summands": ("aten.pow.Tensor_Scalar", pattern("... -> ...", linear=((0,),)), call(real(3, 5), 2)),
    "maximum of summands": (
        "aten.maximum.default",
        pattern("..., ... -> ...", linear=((0, 1),)),
        call(real(3, 5), real(3, 5)),
    ),
    "integers from summands": (
        "aten.to.dtype",
        pattern("... -> ...", linear=((0,),)),
        call(real(3, 5) * 9, torch.int64),
    ),
    "masked_fill with 2": (
        "aten.masked_fill.Scalar",
        pattern("..., ... -> ...", linear=((0,),)),
        call(real(3, 5), PREDICATE, 2.0),
    ),
    "where with 2": (
        "aten.where.ScalarOther",
        pattern("..., ... -> ...", linear=((1,),)),
        call(PREDICATE, real(3, 5), 2.0),
    ),
    "where with one summand": (
        "aten.where.self",
        pattern("..., ..., ... -> ...", linear=((1,),)),
        call(PREDICATE, real(3, 5), real(5)),
    ),
    "pad with 2": (
        "aten.constant_pad_nd.default",
        pattern("d0 a^ -> d0 b^", linear=((0,),)),
        call(real(3, 5), [1, 0], 2.0),
    ),
    "slope of the last dim": ("aten.prelu.default", pattern("..., ... -> ..."), call(real(3, 5, 5), real(5))),
    "transposed dims in place": ("aten.t.default", pattern("d0 d1 -> d0 d1"), call(real(5, 5))),
    "permuted the other way": ("aten.permute.default", pattern("a b c -> c a b"), call(real(5, 5, 5), [1, 2, 0])),
    "merged dim inside out": (
        "aten.reshape.default",
        pattern("(b a) -> a b", local=to_output_shape(aten.reshape.default)),
        call(real(30), [5, 6]),
    ),
    "tiles inside out": ("aten.repeat.default", pattern("d0 -> (d0 n^)"), call(real(6), [2])),
    "copies outermost": (
        "aten.repeat_interleave.self_int",
        pattern("d0 -> (n^ d0)", local=lambda local: (local.target, (local.args[0], 2, 0), {})),
        call(real(6), 2, 0),
    ),
    "expanded dim taken for the other": (
        "aten.expand.default",
        pattern("d -> d e", local=to_output_shape(aten.expand.default)),
        call(real(5), [5, 5]),
    ),
    "q, k and v blind to thirds": (
        "aten.split_with_sizes.default",
        pattern("d0 (c n^) -> d0 c, d0 c, d0 c", local=blind_split),
        call(real(3, 18), [6, 6, 6], 1),
    ),
    "parts swapped": ("aten.cat.default", swapped_parts, call([real(5, 6), real(5, 3)], 1)),
    "selected dim split": ("aten.select.int", pattern("d0 d1 -> d0"), call(real(3, 5), 1, 0)),
    "indexed dim split": ("aten.index_select.default", pattern("n d, n -> n d"), call(real(5, 3), 0, integers(5))),
    "gathered dim split": (
        "aten.gather.default",
        pattern("d0 d1, d0 d1 -> d0 d1"),
        call(real(3, 5), 1, integers(3, 5)),
    ),
    "lookup without offset": (
        "aten.embedding.default",
        pattern("v! e, ... -> ... e", local=first_rows),
        call(real(7, 3), integers(2, 5, below=7)),
    ),
    "frequencies of some ids only": (
        "aten.embedding.default",
        pattern("v^ e, ... -> ... e"),
        call(real(7, 3), integers(3, 5, below=7), -1, True),
    ),
    "offset of a piece in two runs": ("aten.embedding.default", by_rows, call(real(7, 3), integers(2, 5, below=7))),
    "empty piece refused": (
        "aten.pad.default",
        pattern("d0 d1 a^ -> d0 d1 b^"),
        call(real(2, 3, 5), [1, 1], "reflect"),
    ),
    "class without offset": (
        "autotp.losses.pick",
        pattern("n c!, n -> n", local=first_classes),
        SAMPLES["autotp.losses.pick"][0],
    ),
    "logits as summands": (
        "autotp.losses.sum_exp",
        pattern("n c, n -> n", linear=((0,),)),
        SAMPLES["autotp.losses.sum_exp"][0],
    ),
    "causal queries split": (
        ATTENTION,
        pattern(f"b h s e^, {KEYS} -> b h s f^"),
        call(real(2, 3, 5, 4), *[real(2, 3, 5, 4)] * 2, is_causal=True),
    ),
    "keys split": (ATTENTION, pattern("b h s e^, b h t e^, b h t f^, s t -> b h s f^"), call(*[real(2, 3, 5, 4)] * 3)),
    "head size split": (
        ATTENTION,
        pattern("b h s e, b h t^ e, b h t^ f^, s t^ -> b h s f^"),
        call(*[real(2, 3, 5, 4)] * 3),
    ),
    "keys as summands": (
        ATTENTION,
        pattern(f"b h s e^, {KEYS} -> b h s f^", linear=((1,),)),
        call(*[real(2, 3, 5, 4)] * 3),
    ),
    "repeated heads outermost": (
        ATTENTION,
        pattern(f"b (r h) s^ e^, {KEYS} -> b (r h) s^ f^"),
        call(QUERY, KEY, KEY, is_causal=True, enable_gqa=True),
    ),
    "random numbers unannounced": (
        "aten.dropout.default",
        pattern("d0 d1 -> d0 d1", random=False, linear=((0,),)),
        call(real(3, 5), 0.5, True),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rule(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong, sample = WRONG[case]
    prove_rule(target_of(name), *sample.args, limit=4, meshes=[(2,)], **sample.kwargs)
    monkeypatch.setitem(RULES, name, wrong)
    with pytest.raises(AutotpError, match=r"the rule of .* is wrong: on mesh"):
        prove_rule(target_of(name), *sample.args, **sample.kwargs)
