"""Wrong rules of lookups, writes, losses and reductions, planted in place of the right ones: each makes the proof fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from indexing_samples import INFINITE, MASK, ORDER, UNIQUE
from sampling import Sample, call, integers, positive, real, target_of

from autotp import lookups, losses
from autotp.errors import AutotpError
from autotp.prove import prove_rule
from autotp.rules import RULES, bind
from autotp.rules.indexing import masked_embedding, masked_lookup
from autotp.rules.language import Local, LocalSize, LocalStart
from autotp.rules.registry import RuleFunction
from autotp.rules.scatter import masked_add


def pattern(text: str, **options: Any) -> RuleFunction:
    """A rule that is one pattern."""
    return lambda call: bind(text, call, **options)


def multiplied(weight: torch.Tensor, ids: torch.Tensor, start: int, rows: int, padding: int = -1) -> torch.Tensor:
    """A masked lookup whose mask is a factor, so that a row of infinities spoils the others' zeros."""
    here = (ids >= start) & (ids < start + len(weight))
    if not len(weight):
        return masked_embedding(weight, ids, start, rows, padding)
    return weight[(ids - start).where(here, 0)] * here.unsqueeze(-1)


def local(function: Any, *rest: Any, dim: int = 0, args: int = 2) -> Any:
    """A local call of `function` with this rank's start of a split dim of the first operand."""

    def local_call(local: Local) -> Any:
        split = local.operand_split(0, dim)
        if split is None:
            return local.target, local.args, local.kwargs
        return function, (*local.args[:args], LocalStart(split), *rest), {}

    return local_call


def first_elements(dim: int) -> Any:
    """A masked gather that forgets which elements a rank holds."""
    return lambda local: (
        (masked_lookup, (local.args[0], dim, local.args[2], 0, 7, True), {})
        if local.operand_split(0, dim)
        else (local.target, local.args, local.kwargs)
    )


def all_sums(local: Local) -> Any:
    """A mean over what a rank holds."""
    return local.target, local.args, local.kwargs


def twice_added(local: Local) -> Any:
    """A masked addition at the wrong place."""
    split = local.operand_split(0, 0)
    if split is None:
        return local.target, local.args, local.kwargs
    x, dim, index, source = local.args
    return masked_add, (x, dim, index, source, 0, 7, False, 1), {}


ROWS, UNSORTED = integers(5, below=7), real(7)
SCATTER = call(real(3, 7), 1, UNIQUE, real(3, 5))
MEAN_OF_SQUARES = call(real(3, 5), real(3, 5), 1)

WRONG: dict[str, tuple[str, RuleFunction, Sample]] = {
    "infinite rows": (
        "aten.embedding.default",
        pattern("v! e, ... -> ... e", local=local(multiplied, 7)),
        call(INFINITE, torch.tensor([1, 5, 2]), gradient=False),
    ),
    "gather without mask": ("aten.gather.default", pattern("a d, n d -> n d"), call(real(7, 3), 0, integers(5, 3, below=2))),
    "gather without offset": (
        "aten.gather.default",
        pattern("a! d, n d -> n d", local=first_elements(0)),
        call(real(7, 3), 0, integers(5, 3, below=7)),
    ),
    "gathered dims mixed": ("aten.gather.default", pattern("d a^, n d -> n d"), call(real(5, 5), 0, integers(5, 5))),
    "index without mask": ("aten.index.Tensor", pattern("a d, n -> n d"), call(real(7, 3), [integers(5, below=2)])),
    "index linear in the index": ("aten.index_select.default", pattern("a^ d, n -> n d", linear=((0, 1),)), call(real(7, 3), 0, ROWS)),
    "index of two dims": (
        "aten.index.Tensor",
        pattern("a! b^, n, n -> n", local=local(masked_lookup)),
        call(real(7, 3), [ROWS, integers(5, below=3)]),
    ),
    "scatter adds": ("aten.scatter.src", pattern("+d a^, d n, d n -> d a^"), SCATTER),
    "scatter linear in the values": ("aten.scatter.src", pattern("d a^, d n^, d n^ -> d a^", linear=((2,),)), SCATTER),
    "scatter splits what it writes to": ("aten.scatter.src", pattern("d a, d n^, d n^ -> d a"), SCATTER),
    "a number is scattered": ("aten.scatter.value", pattern("d a^, d n^ -> d a^", linear=((0,),)), call(real(3, 7), 1, UNIQUE, 2.0)),
    "tensor added by every rank": (
        "aten.scatter_add.default",
        pattern("d a^, d n, d n -> d a^"),
        call(real(3, 7), 1, integers(3, 5, below=7), real(3, 5)),
    ),
    "added rows in the wrong place": (
        "aten.index_add.default",
        pattern("+a! d, n, n d -> a! d", local=twice_added),
        call(real(7, 3), 0, integers(9, below=7), real(9, 3)),
    ),
    "mean of groups split": (
        "aten.scatter_reduce.two",
        pattern("+d a^, d n, d n -> d a^"),
        call(real(3, 7), 1, integers(3, 5, below=7), real(3, 5), "mean"),
    ),
    "sum forgets what was there": (
        "aten.scatter_reduce.two",
        pattern("+d a^, d n, d n -> d a^"),
        call(real(3, 7), 1, integers(3, 5, below=7), real(3, 5), "sum", include_self=False),
    ),
    "rows copied in pieces": ("aten.index_copy.default", pattern("+a^ d, n, n d -> a^ d"), call(real(7, 3), 0, ORDER[:5], real(5, 3))),
    "rows put in pieces": ("aten.index_put.default", pattern("+a^ d, n, n d -> a^ d"), call(real(7, 3), [ORDER[:5]], real(5, 3))),
    "added to by every rank": (
        "aten.index_put.default",
        pattern("a^ d, n, d -> a^ d"),
        call(real(7, 3), [integers(9, below=7)], real(3), True),
    ),
    "filled with a number": (
        "aten.index_fill.int_Scalar",
        pattern("d a^, n^ -> d a^", linear=((0,),)),
        call(real(3, 7), 1, ORDER[:2], 1.5),
    ),
    "masked values in pieces": ("aten.masked_scatter.default", pattern("d e, d e, n^ -> d e"), call(real(3, 5), MASK, real(15))),
    "overwritten dim split": ("aten.slice_scatter.default", pattern("d a, d b^ -> d a"), call(real(3, 7), real(3, 4), 1, 2, 6)),
    "overwriting alone linear": (
        "aten.select_scatter.default",
        pattern("d a^, d -> d a^", linear=((1,),)),
        call(real(3, 5), real(3), 1, 2),
    ),
    "diagonal split": ("aten.diagonal.default", pattern("d e -> d"), call(real(5, 5))),
    "order of a piece": (
        "aten.searchsorted.Tensor",
        pattern("s, d, s -> d"),
        call(UNSORTED, real(5), sorter=UNSORTED.argsort(), gradient=False),
    ),
    "bins of a piece": ("aten.histc.default", pattern("d -> b^"), call(real(9), 5, gradient=False)),
    "bags of all rows": (
        "autotp.lookups.bags",
        pattern("v! e, i^, o^ -> b^ e", local=lambda local: (lookups.bags, local.args, {})),
        call(real(7, 5), integers(6, below=2), torch.tensor([0, 2]), False, 0, None, False, -1),
    ),
    "mean over a piece": ("aten.mse_loss.default", pattern("d! e!, d! e! ->", local=all_sums), MEAN_OF_SQUARES),
    "mean taken for a sum": ("aten.huber_loss.default", pattern("d e, d e ->"), MEAN_OF_SQUARES),
    "loss linear": ("aten.mse_loss.default", pattern("d^ e^, d^ e^ ->", linear=((0, 1),)), call(real(3, 5), real(3, 5), 2)),
    "classes of a margin": ("aten.multi_margin_loss.default", pattern("n c, n, c -> n"), call(real(5, 7), ROWS, 1, 1, None, 0)),
    "weights of a piece": ("autotp.losses.weight_of_rows", pattern("c, n -> n"), call(real(7), integers(5, below=2), -100)),
    "log of summands": ("autotp.losses.log_of_sum", pattern("n, n -> n", linear=((0, 1),)), call(positive(5), real(5))),
    "class picked by its place": (
        "autotp.losses.pick",
        pattern(
            "n c!, n -> n",
            local=lambda local: (
                (losses.pick, (*local.args[:2], 0, LocalSize(split)), {})
                if (split := local.operand_split(0, 1))
                else (local.target, local.args, local.kwargs)
            ),
        ),
        call(real(5, 7), ROWS),
    ),
    "maximum with a gradient": ("aten.amax.default", pattern("d e -> d"), call(real(3, 5), [1])),
    "median split": ("aten.median.dim", pattern("d e -> d, d"), call(real(3, 8), 1)),
    "running maximum split": ("aten.cummax.default", pattern("d e -> d e, d e"), call(real(3, 8), 1)),
    "transformed dim split": ("aten._fft_c2c.default", pattern("d e -> d e"), call(torch.complex(real(3, 4), real(3, 4)), [1], 0, True)),
    "product of summands": ("aten.prod.dim_int", pattern("d e -> d"), call(real(3, 5), 1)),
    "denominator linear": (
        "aten.addcdiv.default",
        pattern("..., ..., ... -> ...", linear=((0, 1, 2),)),
        call(real(5), real(5), positive(5)),
    ),
    "sum of the logarithms": ("aten.logaddexp.default", pattern("..., ... -> ...", linear=((0, 1),)), call(real(5), real(5))),
    "weights drawn from in pieces": (
        "aten.multinomial.default",
        pattern("d c -> d n^", random=True),
        call(positive(3, 4), 1, gradient=False),
    ),
    "number filled is linear": ("aten.full_like.default", pattern("... -> ...", linear=((0,),)), call(real(5), 2.0)),
    "whole tensor on every rank": ("aten.full.default", pattern("-> d e"), call([3, 5], 2.0, dtype=torch.float64, gradient=False)),
}


@pytest.mark.parametrize("what", sorted(WRONG))
def test_a_wrong_rule_fails(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong, sample = WRONG[what]
    prove_rule(target_of(name), *sample.args, **sample.kwargs)
    monkeypatch.setitem(RULES, name, wrong)
    with pytest.raises(AutotpError, match="is wrong"):
        prove_rule(target_of(name), *sample.args, **sample.kwargs)
